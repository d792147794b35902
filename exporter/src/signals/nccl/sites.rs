// SPDX-License-Identifier: Apache-2.0
//! What of a library's functions is probed, by which program, and what is known of its version?

use std::collections::{BTreeMap, BTreeSet};

use exporter_common::{
    ABSENT,
    nccl::Layout,
    nccl_profiler::{CLOSED, DENIED, FINISHED, OPENED, STARTED},
};
use object::elf::EM_X86_64;

use crate::libraries::elf::{Library, Wanted, cheap, cpp};

/// What is done at a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Probes {
    /// The program at its entry.
    pub(super) entry: &'static str,
    /// The program at its return.
    pub(super) exit: Option<&'static str>,
}

impl Probes {
    /// How many there are.
    pub(super) fn count(self) -> usize {
        1 + usize::from(self.exit.is_some())
    }
}

const fn probes(entry: &'static str, exit: &'static str) -> Probes {
    Probes {
        entry,
        exit: Some(exit),
    }
}

const fn only(entry: &'static str) -> Probes {
    Probes { entry, exit: None }
}

const RETURN: &str = "nccl_return";
const INIT_RETURN: &str = "nccl_init_return";
/// Counts the time of the function as that of the whole initialisation.
const INIT_TIMED_RETURN: &str = "nccl_init_timed_return";

/// Probes of one library of NCCL: the kernel takes a tenth of a second to take one out, and has to take all of them out before the
/// exporter can end.
const PROBES_OF_LIBRARY: usize = 42;

/// The operations that NCCL and RCCL export, the most used first. Not ncclBcast, which calls ncclBroadcast.
#[rustfmt::skip] // one function a line
const OPERATIONS: &[(&str, Probes)] = &[
    ("ncclAllReduce", probes("nccl_all_reduce", RETURN)),
    ("ncclReduceScatter", probes("nccl_reduce_scatter", RETURN)),
    ("ncclAllGather", probes("nccl_all_gather", RETURN)),
    ("ncclSend", probes("nccl_send", RETURN)),
    ("ncclRecv", probes("nccl_recv", RETURN)),
    ("ncclBroadcast", probes("nccl_broadcast", RETURN)),
    ("ncclReduce", probes("nccl_reduce", RETURN)),
    ("ncclAlltoAll", probes("nccl_all_to_all", RETURN)),
    ("ncclAllToAll", probes("nccl_all_to_all", RETURN)),
    ("ncclAllToAllv", probes("nccl_all_to_all_v", RETURN)),
    ("ncclGather", probes("nccl_gather", RETURN)),
    ("ncclScatter", probes("nccl_scatter", RETURN)),
    ("ncclPutSignal", probes("nccl_put_signal", RETURN)),
    ("ncclWaitSignal", probes("nccl_wait_signal", RETURN)),
    ("ncclSignal", probes("nccl_signal", RETURN)),
];

/// What it exports besides: functions that make and end communicators.
#[rustfmt::skip] // one function a line
const LIVES: &[(&str, Probes)] = &[
    ("ncclCommInitRank", probes("nccl_init", INIT_RETURN)),
    ("ncclCommInitRankConfig", probes("nccl_init", INIT_RETURN)),
    ("ncclCommInitRankScalable", probes("nccl_init_scalable", INIT_RETURN)),
    ("ncclCommInitAll", probes("nccl_init_all", "nccl_init_all_return")),
    ("ncclCommSplit", probes("nccl_split", INIT_RETURN)),
    ("ncclCommShrink", probes("nccl_shrink", INIT_RETURN)),
    ("ncclCommGrow", probes("nccl_grow", INIT_RETURN)),
    ("ncclCommDestroy", only("nccl_end")),
    ("ncclCommAbort", only("nccl_end")),
];

/// What is inside, by the beginnings of C++'s names of it: what all operations go through, the whole of an initialisation and its
/// phases.
const ENQUEUE: (&str, Probes) = ("ncclEnqueueCheck", probes("nccl_enqueue", RETURN));
const TOTAL: (&str, Probes) = (
    "ncclCommInitRankFunc",
    probes("nccl_total", "nccl_total_return"),
);
const INSIDE: &[(&str, Probes)] = &[
    ENQUEUE,
    TOTAL,
    ("commAlloc", only("nccl_allocate")),
    ("bootstrapInit", only("nccl_rendezvous")),
    ("bootstrapSplit", only("nccl_rendezvous")),
    (
        "initTransportsRank",
        probes("nccl_transports", "nccl_transports_return"),
    ),
];

/// What the profiler plugin exports.
const PLUGIN: &[(&str, Probes)] = &[
    (OPENED, only("plugin_opened")),
    (STARTED, only("plugin_started")),
    (FINISHED, only("plugin_finished")),
    (CLOSED, only("plugin_closed")),
];

/// What libcuda exports.
const GRAPHS: &[(&str, Probes)] = &[
    ("cuGraphLaunch", only("nccl_graph")),
    ("cuGraphLaunch_ptsz", only("nccl_graph")),
];

/// Every program, for the object.
pub(super) fn programs() -> impl Iterator<Item = (&'static str, bool)> {
    let all = [OPERATIONS, LIVES, INSIDE, PLUGIN, GRAPHS]
        .into_iter()
        .flatten();
    let mut seen = Vec::new();
    let programs = all.flat_map(|(_, probes)| {
        let exit = probes.exit.map(|exit| (exit, true));
        [(probes.entry, false)].into_iter().chain(exit)
    });
    let programs = programs.chain([(INIT_TIMED_RETURN, true)]);
    programs.filter(move |program| {
        let new = !seen.contains(program);
        seen.push(*program);
        new
    })
}

/// A place in a file, and what is done there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Site {
    /// The function, as people know it.
    pub(super) name: &'static str,
    pub(super) probes: Probes,
    /// Where it is probed.
    pub(super) place: u64,
}

/// What a file is to NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// NCCL or RCCL, or something that has one of them linked in.
    Nccl,
    /// The profiler plugin.
    Plugin,
    /// CUDA's driver.
    Cuda,
}

/// A file that is probed.
#[derive(Clone, Debug)]
pub(super) struct Sites {
    pub(super) kind: Kind,
    pub(super) sites: Vec<Site>,
    pub(super) version: Option<Version>,
    /// Whether it is RCCL, AMD's, which has NCCL's interface and numbers of versions, and another inside.
    pub(super) is_rccl: bool,
    /// What is not probed, since a library has more of it than one takes probes.
    pub(super) left_out: Vec<&'static str>,
}

/// What is looked for in a file.
pub(super) fn wanted() -> Wanted {
    let names = |lists: &[&[(&str, Probes)]]| -> BTreeSet<String> {
        let all = lists.iter().flat_map(|list| list.iter());
        all.map(|(name, _)| (*name).to_owned()).collect()
    };
    let mut exported = names(&[OPERATIONS, LIVES, PLUGIN, GRAPHS]);
    exported.insert(OF_RCCL.to_owned());
    Wanted {
        names: exported,
        inside: names(&[INSIDE]),
        before_version: BEFORE_VERSION.map(str::to_owned).into(),
        of_version: NCCL.map(str::to_owned).into(),
    }
}

/// Either of these makes a file NCCL.
const NCCL: [&str; 2] = ["ncclAllReduce", "ncclCommInitRank"];

/// What stands before the version in NCCL and in RCCL, since July 2024 and before (`VERSION_STRING` of their src/init.cc).
const BEFORE_VERSION: [&str; 3] = ["NCCL version ", "RCCL version : ", "RCCL version "];

/// What RCCL exports besides, since the end of 2022 (its nccl.h).
const OF_RCCL: &str = "mscclLoadAlgo";

impl Sites {
    /// Finds what there is to probe in a file. `None` if it has nothing to do with NCCL.
    pub(super) fn of(library: &Library) -> Option<Self> {
        let mut places: BTreeMap<u64, Site> = BTreeMap::new();
        for function in &library.functions {
            let Some((name, probes)) = known(&function.name) else {
                continue;
            };
            // One place a name, whatever the file says.
            if places.values().any(|site| site.name == name) {
                continue;
            }
            // Where nothing is cheap the beginning will do: these are not called a million times a second.
            let skipped = match library.machine {
                EM_X86_64 => cheap(&function.code).unwrap_or_default(),
                _ => 0,
            };
            places.entry(function.at).or_insert(Site {
                name,
                probes,
                place: function.at + skipped,
            });
        }
        let mut sites: Vec<_> = places.into_values().collect();
        let has = |name: &str| sites.iter().any(|site| site.name == name);
        let kind = if NCCL.into_iter().any(has) {
            Kind::Nccl
        } else if has(FINISHED) {
            Kind::Plugin
        } else if has("cuGraphLaunch") {
            Kind::Cuda
        } else {
            return None;
        };
        let told = library.version.as_ref().filter(|_| kind == Kind::Nccl);
        let mut names = library.functions.iter().map(|function| &*function.name);
        let is_rccl = kind == Kind::Nccl
            && (names.any(|name| name == OF_RCCL)
                || told.is_some_and(|(before, _)| before != BEFORE_VERSION[0]));
        // What else a file has the names of is not what it is for.
        let mut left_out = Vec::new();
        match kind {
            Kind::Nccl => (sites, left_out) = few(sites, is_rccl),
            Kind::Plugin => sites.retain(|site| is_in(PLUGIN, site)),
            Kind::Cuda => sites.retain(|site| is_in(GRAPHS, site)),
        }
        Some(Self {
            kind,
            sites,
            version: told.and_then(|(_, number)| Version::of(number)),
            is_rccl,
            left_out,
        })
    }

    /// Its version, if it is NCCL: those of RCCL are other libraries.
    fn nccl(&self) -> Option<Version> {
        self.version.filter(|_| !self.is_rccl)
    }

    /// What is known of the communicators that it makes.
    pub(super) fn layout(&self) -> Layout {
        self.nccl().map_or(UNKNOWN, Version::layout)
    }

    /// Whether communicators that were there before the exporter can be followed.
    pub(super) fn is_known(&self) -> bool {
        self.layout().sequence != ABSENT
    }

    /// Its version, if it is NCCL and the profiler plugin does harm with it.
    pub(super) fn denied(&self) -> Option<Version> {
        let denied =
            |Version(major, minor, patch): &Version| DENIED.contains(&(*major, *minor, *patch));
        self.nccl().filter(denied)
    }
}

fn is_in(list: &[(&str, Probes)], site: &Site) -> bool {
    list.iter().any(|(name, _)| *name == site.name)
}

/// Chooses what is probed of NCCL, so that it takes at most [`PROBES_OF_LIBRARY`]. Returns what is left out for that, too.
///
/// With its symbols all operations are seen at one place. Without, each is at its own, and the phases of an initialisation are not seen. So it is of
/// RCCL, some of whose operations do not come through that place (`mscclEnqueueCheck`). There is room for all that either exports today; of a file that
/// has more the least used ones are left out. An operation is never probed at its entry alone: a call that does not return is a loss.
fn few(mut sites: Vec<Site>, is_rccl: bool) -> (Vec<Site>, Vec<&'static str>) {
    sites.retain(|site| {
        [OPERATIONS, LIVES, INSIDE]
            .iter()
            .any(|list| is_in(list, site))
    });
    let has = |name: &str| sites.iter().any(|site| site.name == name);
    if has(ENQUEUE.0) && has(TOTAL.0) && !is_rccl {
        sites.retain(|site| !is_in(OPERATIONS, site));
        return (sites, Vec::new());
    }
    sites.retain(|site| !is_in(INSIDE, site));
    for site in &mut sites {
        if site.probes.exit == Some(INIT_RETURN) {
            site.probes.exit = Some(INIT_TIMED_RETURN);
        }
    }
    let mut left_out = Vec::new();
    let probes = |sites: &[Site]| sites.iter().map(|site| site.probes.count()).sum::<usize>();
    for (name, _) in OPERATIONS.iter().rev() {
        if probes(&sites) <= PROBES_OF_LIBRARY {
            break;
        }
        if sites.iter().any(|site| site.name == *name) {
            sites.retain(|site| site.name != *name);
            left_out.push(*name);
        }
    }
    (sites, left_out)
}

/// Which function has this name.
fn known(name: &str) -> Option<(&'static str, Probes)> {
    let exact = [OPERATIONS, LIVES, PLUGIN, GRAPHS].into_iter().flatten();
    let mut exact = exact.filter(|(known, _)| *known == name);
    exact.next().copied().or_else(|| {
        let plain = cpp(name)?;
        INSIDE.iter().find(|(known, _)| *known == plain).copied()
    })
}

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32, pub(super) u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Nothing is known.
const UNKNOWN: Layout = Layout {
    hash: ABSENT,
    rank: ABSENT,
    ranks: ABSENT,
    sequence: ABSENT,
};

/// `commHash`, `rank`, `nRanks` and `seqNumber` of `struct ncclComm`, from the debug information of the packages nvidia-nccl-cu12.
#[rustfmt::skip] // a table
const LAYOUTS: &[(Version, [u32; 4])] = &[
    (Version(2, 21, 5), [13528, 13536, 13540, ABSENT]),
    (Version(2, 23, 4), [246944, 246952, 246956, 252568]),
    (Version(2, 24, 3), [246944, 246952, 246956, 252536]),
    (Version(2, 26, 2), [492720, 492728, 492732, 501008]),
    (Version(2, 27, 5), [1066160, 1066168, 1066172, 1074512]),
    (Version(2, 28, 9), [1066184, 1066192, 1066196, 1075728]),
    (Version(2, 29, 7), [1181392, 1181400, 1181404, 1191544]),
    (Version(2, 30, 7), [1181416, 1181424, 1181428, 1191576]),
    (Version(2, 32, 3), [1181408, 1181416, 1181420, 1193800]),
];

impl Version {
    /// What the library says of itself: the numbers of `NCCL version 2.27.5+cuda12.9`.
    fn of(text: &str) -> Option<Self> {
        let numbers: Result<Vec<u32>, _> = text.split('.').map(str::parse).collect();
        match numbers.as_deref() {
            Ok([major, minor, patch]) => Some(Self(*major, *minor, *patch)),
            _ => None,
        }
    }

    fn layout(self) -> Layout {
        let known = LAYOUTS.iter().find(|(version, _)| *version == self);
        known.map_or(UNKNOWN, |(_, [hash, rank, ranks, sequence])| Layout {
            hash: *hash,
            rank: *rank,
            ranks: *ranks,
            sequence: *sequence,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libraries::elf::Function;

    #[test]
    fn functions_are_known_by_their_names_and_by_the_names_of_cpp() {
        let program = |name: &str| known(name).map(|(_, probes)| probes.entry);
        for (name, expected) in [
            ("ncclAllReduce", Some("nccl_all_reduce")),
            ("pncclAllReduce", None),
            ("ncclBcast", None),
            ("ncclAllReduce_", None),
            (STARTED, Some("plugin_started")),
            ("cuGraphLaunch_ptsz", Some("nccl_graph")),
            (
                "_Z20ncclCommInitRankFuncP12ncclAsyncJob",
                Some("nccl_total"),
            ),
            ("_ZL9commAllocP8ncclCommS0_ii", Some("nccl_allocate")),
            ("_ZL9commAllocP8ncclCommS0_ii.isra.0", Some("nccl_allocate")),
            ("_ZL9commAllocP8ncclCommS0_ii.cold", None),
            ("_Z13bootstrapInitiPvP8ncclComm", Some("nccl_rendezvous")),
            (
                "_Z14bootstrapSplitmP8ncclCommS0_iiPi",
                Some("nccl_rendezvous"),
            ),
            ("_ZL18initTransportsRankP8ncclComm", Some("nccl_transports")),
            ("_Z99commAlloc", None),
            ("_Z18446744073709551615commAlloc", None),
            ("_Zcomm", None),
            ("", None),
        ] {
            assert_eq!(program(name), expected, "{name}");
        }
    }

    #[test]
    fn versions_are_told_apart() {
        let is_known = |version: Version| version.layout().sequence != ABSENT;
        assert!(is_known(Version(2, 27, 5)));
        assert!(!is_known(Version(2, 21, 5)));
        assert!(!is_known(Version(2, 27, 6)));
        assert_eq!(Version(2, 99, 1).layout(), UNKNOWN);
        assert_eq!(Version(2, 27, 5).to_string(), "2.27.5");
    }

    #[test]
    fn rccl_is_told_from_nccl_and_takes_none_of_its_layouts() {
        let library = |version: Option<(&str, &str)>, also: &[&str]| Library {
            version: version.map(|(before, number)| (before.to_owned(), number.to_owned())),
            functions: ["ncclAllReduce", "_Z16ncclEnqueueCheckP8ncclInfo"]
                .iter()
                .chain(also)
                .enumerate()
                .map(|(index, name)| Function {
                    name: (*name).to_owned(),
                    at: 16 * index as u64,
                    code: Vec::new(),
                })
                .collect(),
            ..Library::default()
        };
        let sites = |library| Sites::of(&library).expect("of use");
        let nccl = sites(library(Some(("NCCL version ", "2.27.5")), &[]));
        assert!(!nccl.is_rccl && nccl.is_known());
        for (version, also) in [
            (Some(("RCCL version : ", "2.27.5")), &[][..]),
            (Some(("RCCL version ", "2.18.3")), &[][..]),
            (Some(("NCCL version ", "2.27.5")), &[OF_RCCL][..]),
            (None, &[OF_RCCL][..]),
        ] {
            let rccl = sites(library(version, also));
            assert!(rccl.is_rccl && !rccl.is_known(), "{version:?}");
            assert_eq!(rccl.layout(), UNKNOWN, "{version:?}");
            assert_eq!(rccl.version.is_some(), version.is_some());
        }
        // What is no NCCL is no RCCL, whatever else it has.
        let mut other = library(None, &[OF_RCCL, FINISHED]);
        other.functions.remove(0);
        assert!(!sites(other).is_rccl);
    }

    #[test]
    fn each_program_is_named_once() {
        let all: Vec<_> = programs().collect();
        let unique: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(unique.len(), all.len());
        assert!(all.contains(&("nccl_total_return", true)), "{all:?}");
    }

    #[test]
    fn a_library_takes_few_probes() {
        let site = |(name, probes): &(&'static str, Probes)| Site {
            name,
            probes: *probes,
            place: 0,
        };
        let of = |lists: &[&[(&'static str, Probes)]]| {
            let sites = lists.iter().flat_map(|list| list.iter().map(site));
            few(sites.collect(), false).0
        };
        let without = |list: &[(&'static str, Probes)], names: &[&str]| -> Vec<_> {
            let kept = list.iter().filter(|(name, _)| !names.contains(name));
            kept.copied().collect()
        };
        let of_rccl = ["ncclAllToAll", "ncclAllToAllv"];
        let operations = without(OPERATIONS, &of_rccl);
        let count = |sites: &[Site]| sites.iter().map(|site| site.probes.count()).sum::<usize>();
        let exit = |sites: &[Site], name: &str| {
            let site = sites.iter().find(|site| site.name == name);
            site.map(|site| site.probes.exit)
        };

        let with_symbols = of(&[&operations, LIVES, INSIDE]);
        assert_eq!(count(&with_symbols), 25);
        assert_eq!(exit(&with_symbols, "ncclAllReduce"), None);
        assert_eq!(exit(&with_symbols, "ncclEnqueueCheck"), Some(Some(RETURN)));

        let stripped = of(&[&operations, LIVES]);
        assert_eq!(count(&stripped), PROBES_OF_LIBRARY);
        for (name, probes) in &operations {
            assert_eq!(exit(&stripped, name), Some(probes.exit), "{name}");
        }
        let timed = Some(Some(INIT_TIMED_RETURN));
        assert_eq!(exit(&stripped, "ncclCommInitRank"), timed);

        // 2.18 exports less.
        let lives = without(
            LIVES,
            &["ncclCommInitRankScalable", "ncclCommShrink", "ncclCommGrow"],
        );
        let older = of(&[&OPERATIONS[..7], &lives]);
        assert!(count(&older) <= PROBES_OF_LIBRARY);
        assert_eq!(exit(&older, "ncclReduce"), Some(Some(RETURN)));

        // One without the place where all come through.
        assert!(count(&of(&[&operations, LIVES, &INSIDE[1..]])) <= PROBES_OF_LIBRARY);
        // One that has the names of both.
        let both = [OPERATIONS, LIVES].into_iter().flatten().map(site);
        let (both, left_out) = few(both.collect(), false);
        assert_eq!(left_out, ["ncclSignal", "ncclWaitSignal"]);
        assert!(count(&both) <= PROBES_OF_LIBRARY);
        assert_eq!(exit(&both, "ncclAllToAllv"), Some(Some(RETURN)));
        assert_eq!(exit(&both, "ncclSignal"), None);

        // RCCL with its symbols: none of them is used.
        let all = [
            without(
                OPERATIONS,
                &[
                    "ncclAlltoAll",
                    "ncclPutSignal",
                    "ncclWaitSignal",
                    "ncclSignal",
                ],
            ),
            without(
                LIVES,
                &["ncclCommInitRankScalable", "ncclCommShrink", "ncclCommGrow"],
            ),
            INSIDE.to_vec(),
        ];
        let (rccl, left_out) = few(all.iter().flatten().map(site).collect(), true);
        assert!(left_out.is_empty());
        assert!(count(&rccl) <= PROBES_OF_LIBRARY);
        assert_eq!(exit(&rccl, ENQUEUE.0), None);
        assert_eq!(exit(&rccl, "ncclScatter"), Some(Some(RETURN)));
        assert_eq!(exit(&rccl, "ncclCommSplit"), timed);
    }
}
