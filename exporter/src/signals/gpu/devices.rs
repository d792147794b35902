// SPDX-License-Identifier: Apache-2.0
//! By which devices is a GPU driven on this host?

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use exporter_common::gpu::{DRIVERS, Device, Driver, MAX_DRIVERS, MAX_GPUS};

use super::metrics::Driven;

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

/// What having a device open says of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// That it drives a GPU, by this driver.
    pub driver: Option<Arc<str>>,
    /// That it has this GPU of NVIDIA's open: the N of `/dev/nvidiaN`.
    pub gpu: Option<u32>,
}

impl Opened {
    fn by(driver: Driver) -> Self {
        Self::of(DRIVERS[driver as usize].into())
    }

    fn of(driver: Arc<str>) -> Self {
        Self {
            driver: Some(driver),
            gpu: None,
        }
    }

    fn gpu(gpu: u32) -> Self {
        Self {
            driver: None,
            gpu: Some(gpu),
        }
    }
}

/// Bytes of a driver's name that is a label.
const NAME: usize = 64;

/// Character devices of a class: for each its name, its folder and its number.
fn class(sys: &Path, name: &str) -> Vec<(String, PathBuf, (u32, u32))> {
    let nodes = fs::read_dir(sys.join("class").join(name));
    let nodes = nodes.into_iter().flatten().flatten();
    let number = |node: fs::DirEntry| {
        let text = fs::read_to_string(node.path().join("dev")).ok()?;
        let (major, minor) = text.trim().split_once(':')?;
        let number = (major.parse().ok()?, minor.parse().ok()?);
        Some((node.file_name().into_string().ok()?, node.path(), number))
    };
    nodes.filter_map(number).collect()
}

/// The driver of a device, by its folder in sysfs. Modules name drivers as they like; what is no label is told as other.
fn driver(device: &Path) -> Arc<str> {
    let link = fs::read_link(device.join("device/driver")).unwrap_or_default();
    let name = link.file_name().and_then(|name| name.to_str());
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    let name = name.filter(|name| name.len() <= NAME && name.bytes().all(is_part));
    name.unwrap_or(DRIVERS[Driver::Other as usize]).into()
}

impl Places {
    /// The devices that say which processes drive a GPU, by the kernel's `dev_t`; and what those that are `named` and not among them are
    /// instead.
    pub fn devices(&self, named: &[PathBuf]) -> (BTreeMap<u32, Opened>, Vec<String>) {
        let mut devices = BTreeMap::new();
        let mut add = |(major, minor): (u32, u32), opened: Opened| {
            let device: &mut Opened = devices.entry(major << 20 | minor).or_default();
            device.driver = device.driver.take().or(opened.driver);
            device.gpu = device.gpu.or(opened.gpu);
        };
        let text = fs::read_to_string(self.proc.join("devices")).unwrap_or_default();
        let lines = text.lines().take_while(|line| *line != "Block devices:");
        let drivers = lines.filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?.parse::<u32>().ok()?, words.next()?))
        });
        let drivers: Vec<_> = drivers.collect();
        let with_uvm = drivers.iter().any(|(_, name)| *name == "nvidia-uvm");
        for (major, name) in drivers {
            match name {
                // Minor 1 of nvidia-uvm is for debuggers and profilers.
                "nvidia-uvm" => add((major, 0), Opened::by(Driver::Nvidia)),
                "kfd" => add((major, 0), Opened::by(Driver::Amdkfd)),
                // As it is called today, and was before 2023.
                "nvidia" | "nvidia-frontend" if with_uvm => {
                    (0..MAX_GPUS).for_each(|gpu| add((major, gpu), Opened::gpu(gpu)));
                }
                _ => {}
            }
        }
        for (name, _, number) in class(&self.sys, "drm") {
            if name.starts_with("renderD") {
                add(number, Opened::by(Driver::Drm));
            }
        }
        for (name, folder, number) in class(&self.sys, "accel") {
            // Others are for monitoring, as Habana's accel_controlD0.
            let index = name.strip_prefix("accel").unwrap_or_default();
            if !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit()) {
                add(number, Opened::of(driver(&folder)));
            }
        }
        let mut troubles = Vec::new();
        for path in named {
            match self.number(path) {
                Ok(number) => add(number, Opened::by(Driver::Other)),
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

/// The drivers that devices have been seen of, by the numbers of their bits in [`Device::drivers`].
#[derive(Clone, Debug)]
pub(super) struct Drivers(Vec<Arc<str>>);

impl Default for Drivers {
    fn default() -> Self {
        Self(DRIVERS.map(Arc::from).into())
    }
}

impl Drivers {
    /// What the kernel half is told of a device.
    pub(super) fn device(&mut self, opened: &Opened) -> Device {
        let driver = opened.driver.as_ref().map(|driver| self.number(driver));
        Device {
            drivers: driver.map_or(0, |number| 1 << number),
            gpus: opened.gpu.map_or(0, |gpu| 1 << gpu),
        }
    }

    fn number(&mut self, driver: &Arc<str>) -> usize {
        let known = self.0.iter().position(|known| known == driver);
        known.unwrap_or_else(|| {
            if self.0.len() == MAX_DRIVERS {
                return Driver::Other as usize;
            }
            self.0.push(Arc::clone(driver));
            self.0.len() - 1
        })
    }

    /// By which drivers a process drives which GPUs: of NVIDIA's each that it has open, if that is known.
    pub(super) fn driven(&self, devices: Device) -> Vec<Driven> {
        let all = self.0.iter().enumerate();
        let by = all.filter(|(number, _)| devices.drivers >> number & 1 == 1);
        let driven = by.flat_map(|(number, driver)| {
            let is_told = number == Driver::Nvidia as usize && devices.gpus != 0;
            let gpus = (0..MAX_GPUS).filter(move |gpu| is_told && devices.gpus >> gpu & 1 == 1);
            let untold = (!is_told).then_some(None);
            let gpus = gpus.map(Some).chain(untold);
            gpus.map(|gpu| (Arc::clone(driver), gpu))
        });
        driven.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

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
        let (folder, places) = host(&[
            (
                "proc/devices",
                "Character devices:\n  1 mem\n226 drm\n234 kfd\n261 accel\n\nBlock devices:\n  7 kfd\n",
            ),
            ("sys/class/drm/card0/dev", "226:0\n"),
            ("sys/class/drm/renderD128/dev", "226:128\n"),
            ("sys/class/drm/renderD300/dev", "226:300\n"),
            ("sys/class/drm/renderD129/dev", "nonsense\n"),
            ("sys/class/accel/accel0/dev", "261:0\n"),
            ("sys/class/accel/accel1/dev", "261:1\n"),
            ("sys/class/accel/accel2/dev", "261:2\n"),
            ("sys/class/accel/accel_controlD0/dev", "261:64\n"),
            ("sys/class/accel/accel0/device/driver", ""),
        ]);
        let accel = folder.path().join("sys/class/accel");
        for (device, driver) in [("accel0", "habanalabs"), ("accel1", "a driver\n")] {
            let link = accel.join(device).join("device/driver");
            let _ = fs::remove_file(&link);
            fs::create_dir_all(link.parent().expect("a folder")).expect("made");
            symlink(Path::new("../../bus/pci/drivers").join(driver), link).expect("made");
        }
        let drives = |driver: &str| Opened::of(driver.into());
        let expected = BTreeMap::from([
            (234 << 20, drives("amdkfd")),
            (226 << 20 | 128, drives("drm")),
            (226 << 20 | 300, drives("drm")),
            (261 << 20, drives("habanalabs")),
            (261 << 20 | 1, drives("other")),
            (261 << 20 | 2, drives("other")),
        ]);
        assert_eq!(places.devices(&[]), (expected, Vec::new()));
    }

    /// Without nvidia-uvm nobody computes on them, and nothing is attached.
    #[test]
    fn which_gpu_of_nvidia_s_is_open_is_known_beside_what_computes() {
        for name in ["nvidia", "nvidia-frontend"] {
            let text = format!("195 {name}\n195 nvidia-modeset\n195 nvidiactl\n");
            let (_folder, places) = host(&[("proc/devices", &text)]);
            assert_eq!(places.devices(&[]), (BTreeMap::new(), Vec::new()));

            let text = format!("{text}508 nvidia-uvm\n");
            let (_folder, places) = host(&[("proc/devices", &text)]);
            let (devices, _) = places.devices(&[]);
            assert_eq!(devices[&(508 << 20)], Opened::by(Driver::Nvidia));
            assert_eq!(devices[&(195 << 20 | 7)], Opened::gpu(7));
            assert_eq!(devices.len(), 1 + MAX_GPUS as usize);
        }
    }

    #[test]
    fn drivers_have_a_bit_each_as_long_as_there_are_some() {
        let mut drivers = Drivers::default();
        let drives = |driver: &str| Opened::of(driver.into());
        let known = drivers.device(&drives("drm"));
        assert_eq!(known.drivers, 1 << Driver::Drm as u32);
        let first = drivers.device(&drives("habanalabs"));
        assert_eq!(first, drivers.device(&drives("habanalabs")));
        for number in 0..100 {
            drivers.device(&drives(&format!("driver{number}")));
        }
        let beyond = drivers.device(&drives("driver99"));
        assert_eq!(beyond.drivers, 1 << Driver::Other as u32);

        let driven = |devices| -> Vec<_> {
            let driven = drivers.driven(devices).into_iter();
            driven
                .map(|(driver, gpu)| (driver.to_string(), gpu))
                .collect()
        };
        let named = |driver: &str, gpu| (driver.to_owned(), gpu);
        let nvidia = 1 << Driver::Nvidia as u32;
        let devices = |drivers, gpus| Device { drivers, gpus };
        assert_eq!(driven(devices(0, 3)), []);
        assert_eq!(driven(devices(nvidia, 0)), [named("nvidia", None)]);
        assert_eq!(
            driven(devices(nvidia | first.drivers, 1 << 31 | 1)),
            [
                named("nvidia", Some(0)),
                named("nvidia", Some(31)),
                named("habanalabs", None)
            ]
        );
    }

    #[test]
    fn a_device_may_be_named_and_a_file_that_is_none_is_told() {
        let (folder, places) = host(&[("proc/devices", ""), ("file", "")]);
        let named = [
            PathBuf::from("/dev/null"),
            folder.path().join("file"),
            "/nowhere".into(),
        ];
        let expected = BTreeMap::from([(1 << 20 | 3, Opened::by(Driver::Other))]);
        let (devices, troubles) = places.devices(&named);
        assert_eq!(devices, expected);
        let file = format!("--gpu.device {}: it is no device file", named[1].display());
        let nowhere = "--gpu.device /nowhere: there is no such device on this host yet";
        assert_eq!(troubles, [file.as_str(), nowhere]);
    }
}
