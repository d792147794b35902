// SPDX-License-Identifier: Apache-2.0
//! Where is the very file that a process has mapped?
//!
//! A path of a container leads where the container likes. So a path is first resolved without opening anything, inside the
//! container's root; what is there is looked at; and only a regular file that is the one mapped is opened.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use rustix::fs::{
    CWD, FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, major, minor, openat, openat2,
};
use rustix::io::Errno;

use super::{Refusal, Skip, maps::Mapped};

/// `f_type` of file systems (include/uapi/linux/magic.h).
const FUSE: u64 = 0x6573_5546;
/// Those that show another device in `stat` than in `/proc/PID/maps`.
const TWO_DEVICES: [u64; 2] = [0x794c_7630 /* overlay */, 0x9123_683e /* btrfs */];

/// Opens the file that is mapped. `None` where it is mapped no longer.
///
/// # Errors
/// Why it is not opened, and what to do.
pub(crate) fn open(mapped: &Mapped, process: &Path) -> Result<Option<File>, Refusal> {
    let unreadable = |why: String| Refusal::new(Skip::Unreadable, why);
    let (from, to) = mapped.range;
    let exact = process.join("map_files").join(format!("{from:x}-{to:x}"));
    let place = match openat(CWD, &exact, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(place) => place,
        Err(Errno::NOENT | Errno::SRCH) => return Ok(None),
        Err(error @ (Errno::PERM | Errno::ACCESS)) => by_path(mapped, process).map_err(|also| {
            unreadable(format!(
                "cannot open it, neither as it is mapped (map_files: {error}) nor by its path ({also}); add CAP_SYS_PTRACE and CAP_SYS_ADMIN"
            ))
        })?,
        Err(error) => return Err(unreadable(format!("cannot open it: {error}"))),
    };
    let kind = fstat(&place).map(|stat| FileType::from_raw_mode(stat.st_mode));
    match kind {
        Ok(FileType::RegularFile) => {}
        Ok(_) => return Err(Refusal::new(Skip::Malformed, "it is no regular file")),
        Err(error) => return Err(unreadable(format!("cannot look at it: {error}"))),
    }
    if file_system(&place).map_err(|error| unreadable(format!("cannot look at it: {error}")))?
        == FUSE
    {
        let why = "it lies on a file system of user space (FUSE), for which a probe would make the kernel wait";
        return Err(Refusal::new(Skip::FileSystem, why));
    }
    // The way by which a place becomes an open file: proc(5), /proc/pid/fd.
    let here = format!("/proc/self/fd/{}", place.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match openat(CWD, here, flags, Mode::empty()) {
        Ok(file) => Ok(Some(file.into())),
        Err(error) => Err(unreadable(format!("cannot open it: {error}"))),
    }
}

/// Resolves the path inside the root of the process. Wants no more than CAP_SYS_PTRACE, where `map_files` wants CAP_SYS_ADMIN or
/// CAP_CHECKPOINT_RESTORE (5.9, `proc_map_files_get_link`).
fn by_path(mapped: &Mapped, process: &Path) -> io::Result<OwnedFd> {
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, process.join("root"), folder, Mode::empty())?;
    let place = openat2(
        &root,
        &mapped.path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )?;
    let stat = fstat(&place)?;
    let device = (major(stat.st_dev), minor(stat.st_dev));
    let same_device = device == mapped.device || TWO_DEVICES.contains(&file_system(&place)?);
    if stat.st_ino != mapped.inode || !same_device {
        return Err(io::Error::other("another file is there now"));
    }
    Ok(place)
}

#[allow(
    clippy::unnecessary_cast,
    clippy::cast_sign_loss,
    reason = "the type of f_type is another on each architecture"
)]
pub(super) fn file_system(place: impl AsFd) -> rustix::io::Result<u64> {
    Ok(fstatfs(place)?.f_type as u64)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Read,
        os::unix::fs::{MetadataExt, symlink},
        path::PathBuf,
    };

    use super::*;

    /// A process whose mappings cannot be opened by their address: only its root is there. One that may not look sees the same.
    fn process() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let process = folder.path().join("1");
        fs::create_dir_all(process.join("root/lib")).expect("made");
        (folder, process)
    }

    fn mapped(file: &Path, path: &str) -> Mapped {
        let metadata = fs::metadata(file).expect("there");
        Mapped {
            path: path.to_owned(),
            range: (1, 2),
            device: (major(metadata.dev()), minor(metadata.dev())),
            inode: metadata.ino(),
        }
    }

    #[test]
    fn a_path_is_resolved_inside_the_root_of_its_process() {
        let (outside, process) = process();
        let library = process.join("root/lib/libnccl.so.2");
        fs::write(&library, "ours").expect("written");
        let of = |path: &str| by_path(&mapped(&library, path), &process);
        of("/lib/libnccl.so.2").expect("it is there");
        // An absolute link is one of the container's, wherever it leads here.
        symlink("/lib/libnccl.so.2", process.join("root/link")).expect("made");
        of("/link").expect("the same file");
        fs::write(outside.path().join("secret"), "theirs").expect("written");
        symlink(outside.path().join("secret"), process.join("root/out")).expect("made");
        symlink("../../../secret", process.join("root/up")).expect("made");
        for path in ["/out", "/up", "/../../secret", "/nowhere"] {
            let why = of(path).expect_err("not in the root").to_string();
            assert!(why.contains("No such file"), "{path}: {why}");
        }
    }

    #[test]
    fn what_has_taken_the_place_of_a_file_is_not_opened() {
        let (_folder, process) = process();
        let library = process.join("root/lib/libnccl.so.2");
        fs::write(&library, "it").expect("written");
        let before = mapped(&library, "/lib/libnccl.so.2");
        let other = process.join("root/lib/other");
        fs::write(&other, "another").expect("written");
        fs::rename(&other, &library).expect("replaced");
        let why = by_path(&before, &process).expect_err("another").to_string();
        assert!(why.contains("another file"), "{why}");
        let elsewhere = Mapped {
            device: (250, 250),
            ..mapped(&library, "/lib/libnccl.so.2")
        };
        by_path(&elsewhere, &process).expect_err("another device");
    }

    /// As far as this host allows: `map_files` leads to the file even where its path does not.
    #[test]
    fn the_file_that_is_mapped_is_opened() {
        let maps = fs::read_to_string("/proc/self/maps").expect("it runs");
        let libc = maps
            .lines()
            .find(|line| line.contains(" r-xp ") && line.contains("libc.so"));
        let Some(line) = libc else {
            return println!("SKIPPED: this test is linked statically");
        };
        let line = line.replace("libc.so", "libcuda.so");
        let maps =
            super::super::maps::Maps::read(line.as_bytes(), super::super::maps::Interest::Cuda);
        let mapped = &maps.expect("read").files[0];
        match open(mapped, Path::new("/proc/self")) {
            Ok(file) => {
                let mut begin = [0; 4];
                let mut file = file.expect("mapped");
                file.read_exact(&mut begin).expect("it is read");
                assert_eq!(&begin, b"\x7fELF");
                assert_eq!(file.metadata().expect("a file").ino(), mapped.inode);
            }
            Err(refusal) => println!("SKIPPED: needs root: {}", refusal.why),
        }
    }

    #[test]
    fn a_mapping_that_is_gone_is_no_error() {
        let gone = Mapped {
            path: "/lib/libnccl.so.2".to_owned(),
            range: (0x1000, 0x2000),
            device: (0, 1),
            inode: 1,
        };
        match open(&gone, Path::new("/proc/self")) {
            Ok(file) => assert!(file.is_none()),
            Err(refusal) => assert_eq!(refusal.skip, Skip::Unreadable),
        }
    }
}
