// SPDX-License-Identifier: Apache-2.0
//! The devices and queue pairs of this host, in every network namespace, and who owns a queue pair.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{self, MapData};
use exporter_common::{
    ABSENT,
    rdma::{DEVICE_NAME, Device, Number, Pair},
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{
    enumeration::{Answer, Fabric, Listing, PairOwner},
    nldev::{self, Client, NldevError, Pairs, Question},
};
use crate::{
    kernel::symbols,
    signals::{entries, monotonic},
};

/// Network namespaces that are looked into for devices, at most.
const MAX_NAMESPACES: usize = 512;

/// The root cgroup.
const ROOT_ID: u64 = 1;

/// `IB_QPT_XRC_TGT`.
const XRC_TGT: u8 = 10;

/// What the kernel half knows of queue pairs. Shared with the signal, which puts it here while its object is loaded.
#[derive(Debug, Default)]
pub struct Owners {
    maps: Mutex<Option<PairMaps>>,
    /// Apart from the other maps: the scrape reads it, and must not wait for an enumeration.
    devices: Mutex<Option<DeviceMap>>,
    /// Names of devices that netlink has ever listed.
    names: Mutex<BTreeSet<String>>,
}

/// The map of devices.
#[derive(Debug)]
pub struct DeviceMap {
    /// By the address of the device.
    pub devices: maps::HashMap<MapData, u64, Device>,
    /// The first bytes of each device's window are its name.
    pub named: bool,
}

/// The maps of the kernel half that the enumeration uses.
#[derive(Debug)]
pub struct PairMaps {
    /// By the address of the queue pair.
    pub pairs: maps::HashMap<MapData, u64, Pair>,
    /// Owners of pairs that are not among them.
    pub old: maps::HashMap<MapData, Number, u64>,
    /// The kernel half can read a queue pair's number by itself, so it can use `old`.
    pub numbered: bool,
    /// Old pairs that the last listing of their device lacked. A long listing comes in parts and may skip some while
    /// others go, so only the second lack counts.
    pub missing: HashSet<Number>,
}

/// What the kernel half has counted of a device.
#[derive(Clone, Debug)]
pub struct DeviceTotals {
    /// Where its `struct ib_device` is.
    pub address: u64,
    /// `None` as long as it is not known.
    pub name: Option<String>,
    /// Queue pairs created and destroyed.
    pub totals: [u64; 2],
}

impl Owners {
    /// Puts the maps of a loaded object here, or takes them away.
    pub fn replace(&self, maps: Option<(PairMaps, DeviceMap)>) {
        let (pairs, devices) = maps.unzip();
        *self.maps.lock().unwrap_or_else(PoisonError::into_inner) = pairs;
        *self.devices.lock().unwrap_or_else(PoisonError::into_inner) = devices;
    }

    /// Returns what the kernel half has counted of each device.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn devices(&self) -> anyhow::Result<Vec<DeviceTotals>> {
        let map = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(DeviceMap { devices, named }) = &*map else {
            return Ok(Vec::new());
        };
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let totals = |(address, device): (u64, Device)| DeviceTotals {
            address,
            name: name_of(&device, *named, &names),
            totals: [device.created, device.destroyed],
        };
        Ok(entries(devices)?.into_iter().map(totals).collect())
    }

    /// Removes a device that has gone and whose counts have been read.
    pub fn forget(&self, address: u64) {
        let mut map = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(DeviceMap { devices, .. }) = &mut *map {
            let _ = devices.remove(&address);
        }
    }

    /// Notes names of devices that exist.
    fn note<'a>(&self, names: impl Iterator<Item = &'a String>) {
        let mut known = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        known.extend(names.cloned());
    }

    /// Numbers of the device's queue pairs that were made before `began`, with their owners.
    ///
    /// A pair that was made later may have a number which was another's when the kernel listed it.
    fn known(&self, maps: &PairMaps, device: &nldev::Device, began: u64) -> HashMap<u32, u64> {
        let devices = self.devices().unwrap_or_default().into_iter();
        let names: HashMap<_, _> = devices
            .map(|device| (device.address, device.name))
            .collect();
        let here = |pair: &Pair| {
            if pair.index == ABSENT {
                names.get(&pair.device).and_then(Option::as_ref) == Some(&device.name)
            } else {
                pair.index == device.index
            }
        };
        let pairs = maps.pairs.iter().filter_map(Result::ok);
        pairs
            .map(|(_, pair)| pair)
            .filter(|pair| pair.number != ABSENT && pair.created < began)
            .filter(here)
            // Of two with one number, the end of the older was not seen.
            .fold(HashMap::<u32, Pair>::new(), |mut known, pair| {
                let held = known.entry(pair.number).or_insert(pair);
                if held.created < pair.created {
                    *held = pair;
                }
                known
            })
            .into_iter()
            .map(|(number, pair)| (number, pair.cgroup))
            .collect()
    }

    /// Says who owns each queue pair of a device, and tells the kernel half who owns those that are older than it.
    fn attribute(
        &self,
        device: &nldev::Device,
        listed: &Pairs,
        began: u64,
        cgroup_of: impl Fn(u32) -> Option<u64>,
    ) -> Vec<PairOwner> {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let known = maps
            .as_ref()
            .map(|maps| self.known(maps, device, began))
            .unwrap_or_default();
        let mut threads = HashMap::new();
        let mut found = HashMap::new();
        let owners = listed.pairs.iter().map(|pair| {
            // No user of RDMA in the kernel makes XRC targets.
            if pair.of_kernel && pair.kind != XRC_TGT {
                return PairOwner::Kernel;
            }
            if let Some(cgroup) = known.get(&pair.number) {
                return PairOwner::Cgroup(*cgroup);
            }
            let cgroup = pair
                .pid
                .and_then(|pid| *threads.entry(pid).or_insert_with(|| cgroup_of(pid)));
            match cgroup {
                Some(cgroup) => {
                    found.insert(pair.number, cgroup);
                    PairOwner::Cgroup(cgroup)
                }
                None => PairOwner::Unknown,
            }
        });
        let mut owners: Vec<_> = owners.collect();
        if let Some(maps) = maps.as_mut().filter(|maps| maps.numbered) {
            remember(maps, device.index, listed, &found, &mut owners);
        }
        owners
    }
}

/// Finds a device's name in what the kernel half copied.
///
/// Without types the offset is not known, but the names are: the first at a word's boundary is it. A device whose name is
/// not known yet is booked later.
fn name_of(device: &Device, named: bool, known: &BTreeSet<String>) -> Option<String> {
    let text = |bytes: &[u8]| {
        let name = bytes.split(|byte| *byte == 0).next()?;
        let name = std::str::from_utf8(name).ok()?;
        (!name.is_empty()).then(|| name.to_owned())
    };
    if named {
        return text(&device.window[..DEVICE_NAME]);
    }
    let places = (0..=device.window.len() - DEVICE_NAME).step_by(8);
    places
        .map(|at| &device.window[at..at + DEVICE_NAME])
        .find_map(|bytes| {
            // A NUL has to follow; behind it may be the end of an earlier name that was longer.
            let name = text(bytes).filter(|name| known.contains(name))?;
            (bytes.get(name.len()) == Some(&0)).then_some(name)
        })
}

/// Keeps the owners of old queue pairs for the kernel half, and for the time after their threads have gone.
fn remember(
    maps: &mut PairMaps,
    index: u32,
    Pairs { pairs, partial, .. }: &Pairs,
    found: &HashMap<u32, u64>,
    owners: &mut [PairOwner],
) {
    let listed: HashSet<u32> = pairs.iter().map(|pair| pair.number).collect();
    let mut old = HashMap::new();
    let mut gone = Vec::new();
    for (number, cgroup) in maps.old.iter().filter_map(Result::ok) {
        if number.index == index {
            // What is not in a part of a list may be in the rest.
            if listed.contains(&number.number) || partial.is_some() {
                old.insert(number.number, cgroup);
            } else {
                gone.push(number);
            }
        }
    }
    for number in gone {
        if !maps.missing.insert(number) {
            maps.missing.remove(&number);
            let _ = maps.old.remove(&number);
        }
    }
    maps.missing
        .retain(|number| number.index != index || !listed.contains(&number.number));
    for (number, cgroup) in found {
        if !old.contains_key(number) {
            let number = Number {
                index,
                number: *number,
            };
            // Where the map is full, the pair's events go to `unknown`, which is counted there.
            let _ = maps.old.insert(number, cgroup, 0);
        }
    }
    for (pair, owner) in pairs.iter().zip(owners) {
        if let (PairOwner::Unknown, Some(cgroup)) = (*owner, old.get(&pair.number)) {
            *owner = PairOwner::Cgroup(*cgroup);
        }
    }
}

/// The cgroup id of a thread.
fn cgroup_of(thread: u32, root: Option<&Path>) -> Option<u64> {
    let Some(root) = root else {
        // Without a hierarchy the kernel books every thread to its invisible root.
        return Some(ROOT_ID);
    };
    let text = fs::read_to_string(format!("/proc/{thread}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    // A cgroup's id is the number of its folder.
    let folder = root.join(path.trim_start_matches('/'));
    fs::metadata(folder).ok().map(|metadata| metadata.ino())
}

/// A network namespace, by the file that stands for it.
#[derive(Clone, Debug)]
pub struct Namespace {
    file: Arc<File>,
}

/// A device and where it is.
#[derive(Clone, Debug)]
pub struct Place {
    device: nldev::Device,
    /// `None` for this process' own.
    namespace: Option<Namespace>,
}

/// This host.
#[derive(Debug)]
pub struct Host {
    /// What the kernel half knows.
    pub owners: Arc<Owners>,
    /// Where the cgroup v2 hierarchy is.
    pub cgroups: Option<PathBuf>,
}

/// Opening the socket would load ib_core, also while it is on its way out.
fn is_loaded() -> bool {
    symbols::loaded("ib_core").is_some() && symbols::settled("ib_core")
}

/// Lists the devices that are visible from this thread's network namespace, and says if devices belong to one each.
fn devices_here(budget: Duration) -> Result<(Vec<nldev::Device>, bool), NldevError> {
    let mut client = Client::open()?;
    let mut devices = Vec::new();
    client.ask(Question::of_all(nldev::GET, true), budget, |payload| {
        devices.push(nldev::device(payload)?);
        Ok(())
    })?;
    let mut exclusive = false;
    client.ask(Question::of_all(nldev::SYS_GET, false), budget, |payload| {
        exclusive = nldev::exclusive(payload)?;
        Ok(())
    })?;
    Ok((devices, exclusive))
}

/// Runs something in a network namespace, in a thread that ends with it.
fn within<T: Send + 'static>(
    namespace: Namespace,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let thread = thread::Builder::new()
        .name("rdma-netns".to_owned())
        .stack_size(256 << 10)
        .spawn(move || {
            enter(&namespace)?;
            work()
        })
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    thread
        .join()
        .unwrap_or_else(|_| Err("the thread failed".to_owned()))
}

fn enter(namespace: &Namespace) -> Result<(), String> {
    move_into_link_name_space(namespace.file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|error| format!("cannot enter its network namespace (CAP_SYS_ADMIN): {error}"))
}

/// The network namespaces of processes and the named ones, without this process' own, and how many cannot be opened.
fn namespaces() -> (Vec<Namespace>, usize) {
    let own = fs::metadata("/proc/self/ns/net").map(|metadata| metadata.ino());
    let mut seen: HashSet<u64> = own.into_iter().collect();
    let (mut found, mut closed) = (Vec::new(), 0);
    let folder = |path: &str| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let processes = folder("/proc").into_iter().filter(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
    });
    let of_processes = processes.map(|path| path.join("ns/net"));
    let named = ["/run/netns", "/var/run/docker/netns"]
        .into_iter()
        .flat_map(folder);
    for path in of_processes.chain(named) {
        // A link to a namespace is followed to its number; a thread of the kernel has none to follow.
        let number = match fs::metadata(&path) {
            Ok(metadata) => metadata.ino(),
            Err(error) => {
                // Without CAP_SYS_PTRACE nothing tells how many namespaces those processes have.
                closed +=
                    usize::from(closed == 0 && error.kind() == io::ErrorKind::PermissionDenied);
                continue;
            }
        };
        if found.len() >= MAX_NAMESPACES || !seen.insert(number) {
            continue;
        }
        match File::open(&path) {
            Ok(file) => found.push(Namespace {
                file: Arc::new(file),
            }),
            Err(_) => closed += 1,
        }
    }
    (found, closed)
}

impl Fabric for Host {
    type Device = Place;

    fn devices(&self) -> Result<Listing<Place>, String> {
        if !is_loaded() {
            return Ok(Listing {
                devices: Vec::new(),
                troubles: Vec::new(),
            });
        }
        let budget = Duration::from_secs(5);
        let (here, exclusive) = devices_here(budget)
            .map_err(|error| format!("cannot list RDMA devices over netlink: {error}"))?;
        let mut devices: BTreeMap<String, Place> = BTreeMap::new();
        let mut troubles = Vec::new();
        let mut add = |listed: Vec<nldev::Device>, namespace: Option<&Namespace>| {
            for device in listed {
                let place = Place {
                    device: device.clone(),
                    namespace: namespace.cloned(),
                };
                devices.entry(device.name).or_insert(place);
            }
        };
        add(here, None);
        if exclusive {
            let (namespaces, mut closed) = namespaces();
            for namespace in namespaces {
                let listed = within(namespace.clone(), move || {
                    devices_here(budget).map_err(|error| error.to_string())
                });
                match listed {
                    Ok((listed, _)) => add(listed, Some(&namespace)),
                    Err(_) => closed += 1,
                }
            }
            if closed > 0 {
                troubles.push(format!(
                    "RDMA devices belong to one network namespace each (exclusive mode), and {closed} namespaces or more cannot \
                     be looked into (it takes CAP_SYS_ADMIN, CAP_SYS_PTRACE and the host's pid namespace): queue pairs of devices there are \
                     not enumerated"
                ));
            }
        }
        self.owners.note(devices.keys());
        Ok(Listing {
            devices: devices.into_iter().collect(),
            troubles,
        })
    }

    fn queue_pairs(&self, place: &Place, budget: Duration) -> Result<Answer, String> {
        if !is_loaded() {
            return Err("ib_core has been unloaded".to_owned());
        }
        // This thread is the device's own, and ends after this.
        if let Some(namespace) = &place.namespace {
            enter(namespace)?;
        }
        let began = monotonic();
        let index = place.device.index;
        let asked = Instant::now();
        let answer = Client::open().map_err(NldevError::from);
        let answer = answer.and_then(|mut client| {
            nldev::list(place.device.ports, |part, each| {
                let left = budget.saturating_sub(asked.elapsed());
                client.ask(Question::pairs_of(index, part), left, each)
            })
        });
        let listed = answer.map_err(|error| format!("cannot list its queue pairs: {error}"))?;
        let owners = self
            .owners
            .attribute(&place.device, &listed, began, |thread| {
                cgroup_of(thread, self.cgroups.as_deref())
            });
        let Pairs {
            pairs,
            odd,
            partial,
        } = listed;
        Ok(Answer {
            pairs: pairs.into_iter().zip(owners).collect(),
            is_partial: partial.is_some(),
            odd: partial.or_else(|| {
                (odd > 0).then(|| format!("{odd} queue pairs have no number, type or state"))
            }),
        })
    }
}
