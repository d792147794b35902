// SPDX-License-Identifier: Apache-2.0
//! How does the NCCL profiler plugin come from the image to where jobs load it?
//!
//! NCCL keeps the library mapped while a job runs. So the file that is there is never written into: another takes its name,
//! and jobs that run keep the old one. A file that is the same already stays, since each inode costs probes of its own.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

/// Its name, by which NCCL finds it too where `NCCL_PROFILER_PLUGIN` is not set.
pub const NAME: &str = "libnccl-profiler.so";

/// Bytes of a library; `nccl-profiler/build` makes none that is larger.
const MOST: u64 = 65536;

/// What [`install`] did.
#[derive(Debug, PartialEq, Eq)]
pub enum Installed {
    /// The file is new.
    New(PathBuf),
    /// It was there, with the same bytes.
    Same(PathBuf),
}

/// Puts a library into a folder, where every user may read it.
///
/// # Errors
///
/// Where the library is none or too large, or the folder cannot be written to; then what was there is untouched.
pub fn install(from: &Path, folder: &Path) -> anyhow::Result<Installed> {
    let library =
        read(from).with_context(|| format!("cannot read the plugin {}", from.display()))?;
    if !library.starts_with(b"\x7fELF") {
        bail!(
            "{} is no library: nccl-profiler/build makes it",
            from.display()
        );
    }
    let place = folder.join(NAME);
    if read(&place).is_ok_and(|there| there == library) {
        return Ok(Installed::Same(place));
    }
    let new = folder.join(format!(".{NAME}.new"));
    put(&new, &place, &library)
        .inspect_err(|_| drop(fs::remove_file(&new)))
        .with_context(|| format!("cannot write the plugin to {}", folder.display()))?;
    Ok(Installed::New(place))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        // A FIFO would wait for its other end.
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MOST + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > MOST {
        true => Err(io::Error::other(format!("it has more than {MOST} bytes"))),
        false => Ok(bytes),
    }
}

/// Writes a file of its own, made new so that no link leads elsewhere, and gives it the name.
fn put(new: &Path, place: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).open(new)?;
    file.write_all(bytes)?;
    // Whatever the umask is.
    file.set_permissions(Permissions::from_mode(0o755))?;
    file.sync_all()?;
    fs::rename(new, place)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    #[test]
    fn a_library_that_is_there_is_replaced_and_never_written_into() {
        let (image, node) = (folder(), folder());
        let from = image.path().join(NAME);
        let place = node.path().join(NAME);
        let elsewhere = node.path().join("elsewhere");
        fs::write(&from, b"\x7fELF 1").expect("written");
        fs::write(&elsewhere, "theirs").expect("written");
        symlink(&elsewhere, &place).expect("a link");
        symlink(&elsewhere, node.path().join(format!(".{NAME}.new"))).expect("a link");

        let new = install(&from, node.path()).expect("installed");
        assert_eq!(new, Installed::New(place.clone()));
        assert_eq!(fs::read(&place).expect("there"), b"\x7fELF 1");
        assert_eq!(fs::read(&elsewhere).expect("there"), b"theirs");
        let first = fs::symlink_metadata(&place).expect("there");
        assert_eq!(first.mode() & 0o7777, 0o755);

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
    fn what_is_no_library_is_refused_and_nothing_written() {
        let (image, node) = (folder(), folder());
        let from = image.path().join(NAME);
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
    }
}
