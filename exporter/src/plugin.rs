// SPDX-License-Identifier: Apache-2.0
//! How does the NCCL profiler plugin come from the image to where jobs load it?
//!
//! NCCL keeps the library mapped while a job runs. So the file that is there is never written into: another takes its name,
//! and jobs that run keep the old one. A file that is the same already stays, since each inode costs probes of its own.

use std::{
    fs::{self, Metadata, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use rustix::{fs::OFlags, process::geteuid};

/// Its name, by which NCCL finds it too where `NCCL_PROFILER_PLUGIN` is not set.
pub const NAME: &str = "libnccl-profiler.so";

/// Bytes of a library; `nccl-profiler/build` makes none that is larger.
const MOST: u64 = 65536;

/// For every user to read, and for its owner to write.
const MODE: u32 = 0o755;

/// What [`install`] did.
#[derive(Debug, PartialEq, Eq)]
pub enum Installed {
    /// The file is new.
    New(PathBuf),
    /// It was there, and nobody else can have changed it.
    Same(PathBuf),
}

/// Puts a library into a folder, where every user may read it.
///
/// # Errors
///
/// Where the library is none or too large, or the folder cannot be written to; then what was there is untouched.
pub fn install(from: &Path, folder: &Path) -> anyhow::Result<Installed> {
    let (library, _) =
        read(from).with_context(|| format!("cannot read the plugin {}", from.display()))?;
    if !library.starts_with(b"\x7fELF") {
        bail!(
            "{} is no library: nccl-profiler/build makes it",
            from.display()
        );
    }
    let place = folder.join(NAME);
    // A file of another user's, or with another name, can be changed when nobody looks; a link leads elsewhere in each container.
    let is_ours = |file: &Metadata| {
        let mode = file.mode() & 0o7777;
        (file.uid(), file.nlink(), mode) == (geteuid().as_raw(), 1, MODE)
    };
    if read(&place).is_ok_and(|(there, file)| there == library && is_ours(&file)) {
        return Ok(Installed::Same(place));
    }
    put(folder, &place, &library)
        .with_context(|| format!("cannot write the plugin to {}", folder.display()))?;
    Ok(Installed::New(place))
}

/// The bytes of a regular file, and what it is; a link is none.
fn read(path: &Path) -> io::Result<(Vec<u8>, Metadata)> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK; // A FIFO would wait for its other end.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MOST + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > MOST {
        true => Err(io::Error::other(format!("it has more than {MOST} bytes"))),
        false => Ok((bytes, metadata)),
    }
}

/// Writes a file with a name of its own, which nobody else writes or waits for, and then gives it the name.
fn put(folder: &Path, place: &Path, bytes: &[u8]) -> io::Result<()> {
    let unique = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let new = folder.join(format!(".{NAME}.{}", unique.trim()));
    let mut file = OpenOptions::new().write(true).create_new(true).open(&new)?;
    let written = file
        .write_all(bytes)
        // Whatever the umask is.
        .and_then(|()| file.set_permissions(Permissions::from_mode(MODE)))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&new, place));
    written.inspect_err(|_| drop(fs::remove_file(&new)))?;
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A folder for an image, one for a node, the plugin's file in the one, and its place in the other.
    fn places() -> (TempDir, TempDir, PathBuf, PathBuf) {
        let [image, node] = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        let (from, place) = (image.path().join(NAME), node.path().join(NAME));
        (image, node, from, place)
    }

    #[test]
    fn a_library_that_is_there_is_replaced_and_never_written_into() {
        let (_image, node, from, place) = places();
        let elsewhere = node.path().join("elsewhere");
        fs::write(&from, b"\x7fELF 1").expect("written");
        fs::write(&elsewhere, "theirs").expect("written");
        symlink(&elsewhere, &place).expect("a link");

        let new = install(&from, node.path()).expect("installed");
        assert_eq!(new, Installed::New(place.clone()));
        assert_eq!(fs::read(&place).expect("there"), b"\x7fELF 1");
        assert_eq!(fs::read(&elsewhere).expect("there"), b"theirs");
        let first = fs::symlink_metadata(&place).expect("there");
        assert_eq!(first.mode() & 0o7777, MODE);

        let same = install(&from, node.path()).expect("installed");
        assert_eq!(same, Installed::Same(place.clone()));
        assert_eq!(fs::metadata(&place).expect("there").ino(), first.ino());

        let mapped = fs::File::open(&place).expect("there");
        fs::write(&from, b"\x7fELF 2").expect("written");
        install(&from, node.path()).expect("installed");
        assert_eq!(io::read_to_string(mapped).expect("read"), "\x7fELF 1");
        assert_eq!(fs::read(&place).expect("there"), b"\x7fELF 2");
        // Nothing else is left.
        assert_eq!(fs::read_dir(node.path()).expect("there").count(), 2);
    }

    #[test]
    fn the_same_bytes_are_not_enough_where_somebody_else_can_change_them() {
        let (_image, node, from, place) = places();
        let other = node.path().join("other");
        fs::write(&from, b"\x7fELF").expect("written");
        let link = || symlink(&from, &place).expect("a link");
        let copy = |mode| {
            fs::copy(&from, &place).expect("copied");
            fs::set_permissions(&place, Permissions::from_mode(mode)).expect("ours");
        };
        let second_name = || {
            copy(MODE);
            fs::hard_link(&place, &other).expect("a link");
        };
        let cases: [&dyn Fn(); 4] = [&link, &|| copy(0o777), &|| copy(0o600), &second_name];
        for case in cases {
            let _ = fs::remove_file(&place);
            case();
            let new = install(&from, node.path()).expect("installed");
            assert_eq!(new, Installed::New(place.clone()));
            let there = fs::symlink_metadata(&place).expect("there");
            assert!(there.is_file() && there.nlink() == 1 && there.mode() & 0o7777 == MODE);
        }
    }

    #[test]
    fn what_is_no_library_is_refused_and_nothing_written() {
        let (_image, node, from, place) = places();
        let refused = |says: &str| {
            let error = install(&from, node.path()).expect_err("refused");
            assert!(format!("{error:#}").contains(says), "{error:#}");
            assert_eq!(fs::read_dir(node.path()).expect("there").count(), 0);
        };
        refused("cannot read the plugin");
        fs::write(&from, "text").expect("written");
        refused("is no library");
        fs::write(&from, vec![0; 65537]).expect("written");
        refused("more than 65536 bytes");
        fs::remove_file(&from).expect("there");
        fs::create_dir(&from).expect("made");
        refused("no regular file");
        fs::remove_dir(&from).expect("there");
        fs::write(&from, b"\x7fELF").expect("written");
        let error = install(&from, &node.path().join("nowhere")).expect_err("refused");
        assert!(
            format!("{error:#}").contains("cannot write the plugin to"),
            "{error:#}"
        );
        // A folder in the way is not removed, and nothing is left beside it.
        fs::create_dir(&place).expect("made");
        install(&from, node.path()).expect_err("refused");
        assert_eq!(fs::read_dir(node.path()).expect("there").count(), 1);
    }
}
