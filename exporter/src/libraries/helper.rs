// SPDX-License-Identifier: Apache-2.0
//! How is something of a container looked at without ever waiting for it?
//!
//! A file of a container may lie on a file system that does not answer (FUSE, NFS). Then whoever opens or reads it waits in the kernel, and with
//! FUSE not even SIGKILL ends that (`request_wait_answer`, fs/fuse/dev.c). So a process of its own does it, `chandra look`, which the exporter
//! asks over a socket and gives up when no answer comes: it costs that file and a process that sleeps, and never the exporter's end.
//!
//! What is read there is hostile; the helper has no map and no program, its memory is bounded, and it is the first to go where memory is short.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, BufReader, IoSlice, IoSliceMut, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
    process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit},
};
use serde::{Deserialize, Serialize};

use super::{
    Identity, Refusal, Skip,
    elf::{Library, Wanted},
    maps::{Interest, Mapped, Maps},
    open::open,
};

/// How long an answer is waited for: longer than what the helper itself ends after.
const PATIENCE: Duration = Duration::from_secs(6);

/// Bytes of an answer. The longest is the files of a process with their paths, of each byte of which JSON may make six.
const ANSWER: usize = 8 << 20;

/// Memory of the helper, in addresses. A file takes a third of it at most.
const MEMORY: u64 = 192 << 20;

/// What `ps` calls the helper; `pidof chandra` is the exporter alone.
const NAME: &str = "chandra-look";

/// What the helper is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// What a process has mapped.
    Maps { process: u32, interest: Interest },
    /// Which files these are; answered one by one.
    Identify { process: u32, files: Vec<Mapped> },
    /// What is in a file.
    Examine {
        process: u32,
        file: Mapped,
        wanted: Wanted,
    },
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// `None` where the process is gone.
    Maps(Result<Option<Maps>, Refusal>),
    /// `None` where it is mapped no longer.
    Identity(Result<Option<Identity>, Refusal>),
    /// The open file comes with it, if there is one.
    Library(Result<Option<(Identity, Library)>, Refusal>),
}

/// The way to a helper.
#[derive(Debug)]
pub(super) struct Helper {
    child: Child,
    socket: UnixStream,
    /// What has come of the next answers.
    heard: Vec<u8>,
    files: Vec<OwnedFd>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Silence {
    /// It takes longer than [`PATIENCE`].
    Late,
    /// The helper has ended.
    Ended(String),
}

/// What is left of a helper that was given up and does not end: it waits in the kernel.
#[derive(Debug)]
pub(super) struct Stuck(Child);

impl Stuck {
    /// Says if it has ended after all.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Helper {
    /// Starts one.
    pub(super) fn start() -> anyhow::Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("make a socket")?;
        let kept = [
            "MALLOC_ARENA_MAX",
            "MALLOC_TRIM_THRESHOLD_",
            "MALLOC_MMAP_THRESHOLD_",
        ];
        let environment = kept
            .into_iter()
            .filter_map(|name| Some((name, std::env::var_os(name)?)));
        // The program that runs, also where its file has been replaced.
        let child = Command::new("/proc/self/exe")
            .arg0(NAME)
            .arg("look")
            .env_clear()
            .envs(environment)
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start the process that looks into files")?;
        Ok(Self {
            child,
            socket: ours,
            heard: Vec::new(),
            files: Vec::new(),
        })
    }

    /// Asks. What does not fit into the socket's buffer waits as long as an answer.
    pub(super) fn ask(&mut self, ask: &Ask) -> Result<(), Silence> {
        let mut line = serde_json::to_vec(ask).expect("plain data");
        line.push(b'\n');
        let sent = self.socket.set_write_timeout(Some(PATIENCE));
        match sent.and_then(|()| self.socket.write_all(&line)) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Silence::Late),
            Err(error) => Err(Silence::Ended(error.to_string())),
        }
    }

    /// The next answer, and the file that came with it.
    pub(super) fn answer(&mut self) -> Result<(Answer, Option<File>), Silence> {
        let until = Instant::now() + PATIENCE;
        let mut searched = 0;
        loop {
            if let Some(end) = memchr::memchr(b'\n', &self.heard[searched..]) {
                let rest = self.heard.split_off(searched + end + 1);
                let line = std::mem::replace(&mut self.heard, rest);
                let answer = serde_json::from_slice(&line);
                let answer = answer.map_err(|error| Silence::Ended(error.to_string()))?;
                let with_file = matches!(answer, Answer::Library(Ok(Some(_))));
                let file =
                    (with_file && !self.files.is_empty()).then(|| self.files.remove(0).into());
                return Ok((answer, file));
            }
            searched = self.heard.len();
            if searched > ANSWER {
                return Err(Silence::Ended("it says too much".to_owned()));
            }
            self.hear(until)?;
        }
    }

    /// Waits for something to be said.
    fn hear(&mut self, until: Instant) -> Result<(), Silence> {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut ready, Some(&left)) {
            Ok(0) => return Err(Silence::Late),
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(Silence::Ended(error.to_string())),
        }
        let mut bytes = [0; 64 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = RecvAncillaryBuffer::new(&mut space);
        let heard = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut with,
            RecvFlags::CMSG_CLOEXEC,
        );
        let heard = heard.map_err(|error| Silence::Ended(error.to_string()))?;
        for message in with.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        if heard.bytes == 0 {
            let why = match self.child.try_wait() {
                Ok(Some(status)) => format!("the process that does it ended: {status}"),
                _ => "the process that does it ended".to_owned(),
            };
            return Err(Silence::Ended(why));
        }
        self.heard.extend_from_slice(&bytes[..heard.bytes]);
        Ok(())
    }

    /// Gives it up. What is left of it, where it does not end at once.
    pub(super) fn give_up(mut self) -> Option<Stuck> {
        let _ = self.child.kill();
        let until = Instant::now() + Duration::from_millis(500);
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(None) => return Some(Stuck(self.child)),
                _ => return None,
            }
        }
    }
}

/// Answers what is asked on standard input until that ends: `chandra look`.
///
/// # Errors
/// When it is no socket, or what is asked makes no sense.
pub fn look() -> anyhow::Result<()> {
    let name = CString::new(NAME).expect("no zero");
    rustix::thread::set_name(&name).context("take a name")?;
    // Where the exporter is killed while this waits for a file.
    set_parent_process_death_signal(Some(Signal::KILL)).context("follow the exporter's end")?;
    for (resource, limit) in [
        (Resource::As, MEMORY),
        (Resource::Core, 0),
        (Resource::Nofile, 64),
    ] {
        let limit = Some(limit);
        let limit = Rlimit {
            current: limit,
            maximum: limit,
        };
        setrlimit(resource, limit).context("bound what this may take")?;
    }
    // Not permitted everywhere, and no more than a wish.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    serve(io::stdin().as_fd(), Path::new("/proc"))
}

fn serve(socket: BorrowedFd<'_>, proc: &Path) -> anyhow::Result<()> {
    let input = File::from(socket.try_clone_to_owned()?);
    for ask in serde_json::Deserializer::from_reader(BufReader::new(input)).into_iter() {
        match ask.context("read what is asked")? {
            Ask::Maps { process, interest } => {
                let maps = maps(&folder(proc, process), interest);
                say(socket, &Answer::Maps(maps), None)?;
            }
            Ask::Identify { process, files } => {
                let folder = folder(proc, process);
                for file in files {
                    let identity = opened(&file, &folder).map(|file| Some(file?.0));
                    say(socket, &Answer::Identity(identity), None)?;
                }
            }
            Ask::Examine {
                process,
                file,
                wanted,
            } => {
                let found = opened(&file, &folder(proc, process)).and_then(|found| {
                    let Some((identity, file)) = found else {
                        return Ok(None);
                    };
                    let library = Library::of(&file, &wanted)?;
                    Ok(Some((identity, library, file)))
                });
                let (answer, file) = match found {
                    Ok(Some((identity, library, file))) => {
                        (Ok(Some((identity, library))), Some(file))
                    }
                    Ok(None) => (Ok(None), None),
                    Err(refusal) => (Err(refusal), None),
                };
                let file = file.as_ref().map(File::as_fd);
                say(socket, &Answer::Library(answer), file)?;
            }
        }
    }
    Ok(())
}

fn folder(proc: &Path, process: u32) -> PathBuf {
    proc.join(process.to_string())
}

fn maps(process: &Path, interest: Interest) -> Result<Option<Maps>, Refusal> {
    let path = process.join("maps");
    let read = File::open(&path).and_then(|file| {
        let text = BufReader::with_capacity(64 << 10, file);
        Maps::read(text, interest)
    });
    let why = match read {
        Ok(maps) => return Ok(Some(maps)),
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            format!(
                "cannot read {}: {error}; add CAP_SYS_PTRACE",
                path.display()
            )
        }
        Err(error) => format!("cannot read {}: {error}", path.display()),
    };
    Err(Refusal::new(Skip::Unreadable, why))
}

fn is_gone(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    [Errno::NOENT, Errno::SRCH]
        .iter()
        .any(|gone| code == Some(gone.raw_os_error()))
}

/// The file, and what it is told apart by. `None` where it is mapped no longer.
fn opened(file: &Mapped, process: &Path) -> Result<Option<(Identity, File)>, Refusal> {
    let Some(file) = open(file, process)? else {
        return Ok(None);
    };
    match Identity::of(&file) {
        Ok(identity) => Ok(Some((identity, file))),
        Err(error) => {
            let why = format!("cannot look at it: {error}");
            Err(Refusal::new(Skip::Unreadable, why))
        }
    }
}

/// Says something, the file with its first bytes.
fn say(
    socket: BorrowedFd<'_>,
    answer: &Answer,
    file: Option<BorrowedFd<'_>>,
) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    ensure!(line.len() <= ANSWER, "an answer that is too long");
    let files: Vec<_> = file.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !with.push(SendAncillaryMessage::ScmRights(&files)) {
        bail!("no room for a file");
    }
    let mut rest = &line[..];
    while !rest.is_empty() {
        let sent = sendmsg(
            socket,
            &[IoSlice::new(rest)],
            &mut with,
            SendFlags::NOSIGNAL,
        );
        rest = &rest[sent.context("answer")?..];
        with.clear();
    }
    Ok(())
}
