// SPDX-License-Identifier: Apache-2.0
//! By which devices is a GPU driven on this host?

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use exporter_common::gpu::Driver;

/// Places of this host.
#[derive(Clone, Debug)]
pub struct Places {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys`.
    pub sys: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }
}

impl Places {
    /// The devices by which a GPU is driven, by the kernel's `dev_t`, each with the bit of its driver; and what those that are named
    /// and not among them are instead.
    pub fn devices(&self, named: &[PathBuf]) -> (BTreeMap<u32, u32>, Vec<String>) {
        let mut devices = BTreeMap::new();
        let mut add = |major: u32, minor: u32, driver: Driver| {
            *devices.entry(major << 20 | minor).or_default() |= 1 << driver as u32;
        };
        let text = fs::read_to_string(self.proc.join("devices")).unwrap_or_default();
        let lines = text.lines().take_while(|line| *line != "Block devices:");
        for line in lines {
            let mut words = line.split_whitespace();
            let (Some(Ok(major)), Some(name)) = (words.next().map(str::parse), words.next()) else {
                continue;
            };
            // Minor 1 of nvidia-uvm is for debuggers and profilers.
            match name {
                "nvidia-uvm" => add(major, 0, Driver::Nvidia),
                "kfd" => add(major, 0, Driver::Amdkfd),
                _ => {}
            }
        }
        let nodes = fs::read_dir(self.sys.join("class/drm"))
            .into_iter()
            .flatten();
        for node in nodes.flatten() {
            if !node.file_name().to_string_lossy().starts_with("renderD") {
                continue;
            }
            let text = fs::read_to_string(node.path().join("dev")).unwrap_or_default();
            if let Some((major, minor)) = text.trim().split_once(':')
                && let (Ok(major), Ok(minor)) = (major.parse(), minor.parse())
            {
                add(major, minor, Driver::Drm);
            }
        }
        let mut troubles = Vec::new();
        for path in named {
            match self.number(path) {
                Ok((major, minor)) => add(major, minor, Driver::Other),
                Err(why) => troubles.push(format!("--gpu.device {}: {why}", path.display())),
            }
        }
        (devices, troubles)
    }

    /// The number of a character device's file, here or at the host.
    fn number(&self, path: &Path) -> Result<(u32, u32), &'static str> {
        let at_host = path.strip_prefix("/").unwrap_or(path);
        let at_host = self.proc.join("1/root").join(at_host);
        let mut why = "there is no such device on this host yet";
        for path in [path, &at_host] {
            match fs::metadata(path) {
                Ok(metadata) if metadata.file_type().is_char_device() => {
                    let device = metadata.rdev();
                    return Ok((rustix::fs::major(device), rustix::fs::minor(device)));
                }
                Ok(_) => why = "it is no device file",
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    why = "the host's files may not be looked at; add CAP_SYS_PTRACE";
                }
                Err(_) => {}
            }
        }
        Err(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with these files.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Places) {
        let folder = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, text).expect("written");
        }
        let places = Places {
            proc: folder.path().join("proc"),
            sys: folder.path().join("sys"),
        };
        (folder, places)
    }

    #[test]
    fn devices_that_drive_a_gpu_are_found_and_others_are_not() {
        let (_folder, places) = host(&[
            (
                "proc/devices",
                "Character devices:\n  1 mem\n195 nvidia\n195 nvidiactl\n226 drm\n234 kfd\n508 nvidia-uvm\n\nBlock devices:\n  7 kfd\n",
            ),
            ("sys/class/drm/card0/dev", "226:0\n"),
            ("sys/class/drm/renderD128/dev", "226:128\n"),
            ("sys/class/drm/renderD300/dev", "226:300\n"),
            ("sys/class/drm/renderD129/dev", "nonsense\n"),
        ]);
        let bit = |driver: Driver| 1 << driver as u32;
        let expected = BTreeMap::from([
            (508 << 20, bit(Driver::Nvidia)),
            (234 << 20, bit(Driver::Amdkfd)),
            (226 << 20 | 128, bit(Driver::Drm)),
            (226 << 20 | 300, bit(Driver::Drm)),
        ]);
        assert_eq!(places.devices(&[]), (expected, Vec::new()));
    }

    #[test]
    fn a_device_may_be_named_and_a_file_that_is_none_is_told() {
        let (folder, places) = host(&[("proc/devices", ""), ("file", "")]);
        let named = [
            PathBuf::from("/dev/null"),
            folder.path().join("file"),
            "/nowhere".into(),
        ];
        let expected = BTreeMap::from([(1 << 20 | 3, 1 << Driver::Other as u32)]);
        let (devices, troubles) = places.devices(&named);
        assert_eq!(devices, expected);
        let file = format!("--gpu.device {}: it is no device file", named[1].display());
        let nowhere = "--gpu.device /nowhere: there is no such device on this host yet";
        assert_eq!(troubles, [file.as_str(), nowhere]);
    }
}
