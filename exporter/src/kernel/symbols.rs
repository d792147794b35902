// SPDX-License-Identifier: Apache-2.0
//! In which module does a function live?
//!
//! A kprobe on a module's function has to name the module: the same name may exist elsewhere. The names are in
//! `/proc/kallsyms` for everyone, whatever happens to the addresses.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::OnceLock,
};

/// Where each of some functions lives.
#[derive(Debug, Default)]
pub struct Symbols(HashMap<String, Vec<Symbol>>);

/// A function, by a name that may be longer than was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Symbol {
    name: String,
    module: Option<String>,
}

/// A function that can be named for a kprobe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its module; `None` for the kernel image.
    pub module: Option<String>,
    /// As perf_event_open(2) takes it: `module:function`.
    pub target: String,
    /// What to try where the kernel does not find that: from 6.6 to 6.10 it compares names of the image without `.llvm.N`, and
    /// shows them with it.
    pub short: Option<String>,
}

/// What a compiler has made of a function, by what it has put behind its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Made {
    /// Nothing, or another name: `.llvm.N`, `.lto_priv.N` and `.__uniq.N` make a static function's name one of its own where whole
    /// programs are optimised. Its arguments are what they were.
    Whole,
    /// A copy with other arguments: without some, or with parts in their place (`.isra.N`), or with constants (`.constprop.N`).
    Changed,
    /// A part of it: `.cold`, `.part.N`.
    Part,
}

impl Made {
    fn of(suffixes: &str) -> Self {
        let words = suffixes.split('.').filter(|word| !word.is_empty());
        let is_number = |word: &str| word.bytes().all(|byte| byte.is_ascii_digit());
        words.fold(Self::Whole, |made, word| match (made, word) {
            (Self::Part, _) | (_, "cold" | "part") => Self::Part,
            (made, "llvm" | "lto_priv" | "__uniq") => made,
            (made, word) if is_number(word) => made,
            _ => Self::Changed,
        })
    }
}

impl Symbols {
    /// Finds some functions in the running kernel.
    ///
    /// # Errors
    /// When `/proc/kallsyms` cannot be read.
    pub fn of_kernel<'a>(wanted: impl IntoIterator<Item = &'a str>) -> io::Result<Self> {
        Self::read(BufReader::new(File::open("/proc/kallsyms")?), wanted)
    }

    /// Finds some functions in a text like `/proc/kallsyms`: address, type, name and perhaps `[module]`.
    ///
    /// # Errors
    /// When the text cannot be read.
    pub fn read<'a>(
        mut text: impl BufRead,
        wanted: impl IntoIterator<Item = &'a str>,
    ) -> io::Result<Self> {
        let mut found: HashMap<String, Vec<Symbol>> = wanted
            .into_iter()
            .map(|name| (name.to_owned(), Vec::new()))
            .collect();
        let mut line = Vec::new();
        while text.read_until(b'\n', &mut line)? > 0 {
            let mut fields = std::str::from_utf8(&line)
                .unwrap_or_default()
                .split_ascii_whitespace()
                .skip(1);
            if let (Some("t" | "T"), Some(name)) = (fields.next(), fields.next())
                && let Some(symbols) = found.get_mut(name.split('.').next().unwrap_or(name))
            {
                let module = fields.next();
                symbols.push(Symbol {
                    name: name.to_owned(),
                    module: module.map(|module| module.trim_matches(['[', ']']).to_owned()),
                });
            }
            line.clear();
        }
        Ok(Self(found))
    }

    /// Returns where a function lives. What live patches put in its place has its name as well: the kernel enters the function
    /// and goes on there, so a probe at the function sees all calls. Kernels with commit b022f0c7e404 (6.6, and stable ones) refuse to
    /// probe a function of the image while a module has one of its name.
    ///
    /// # Errors
    /// One line, where there is none of this name or more than one, or only what the compiler has made of it.
    pub fn find(&self, name: &str) -> Result<Function, String> {
        let made = |symbol: &&Symbol| Made::of(&symbol.name[name.len()..]);
        let (whole, others): (Vec<_>, Vec<_>) = self
            .own(name)
            .partition(|symbol| made(symbol) == Made::Whole);
        // One that has its name is not to be taken for one whose name was made longer.
        let (plain, longer): (Vec<_>, Vec<_>) =
            whole.into_iter().partition(|symbol| symbol.name == name);
        let found = if plain.is_empty() { longer } else { plain };
        match (
            &found[..],
            others.iter().find(|symbol| made(symbol) == Made::Changed),
        ) {
            ([Symbol { name, module }], _) => Ok(Function {
                module: module.clone(),
                target: module
                    .as_ref()
                    .map_or_else(|| name.clone(), |module| format!("{module}:{name}")),
                short: match (module, name.split_once(".llvm.")) {
                    (None, Some((short, _))) => Some(short.to_owned()),
                    _ => None,
                },
            }),
            ([], Some(changed)) => Err(format!(
                "the compiler has made {} of {name}, whose arguments may be others: not probed",
                changed.name
            )),
            ([], None) if !others.is_empty() => Err(format!(
                "the compiler has left only {} of {name}, which is a part of it: not probed",
                others[0].name
            )),
            ([], None) => Err(format!("no loaded module has a function {name}")),
            (several, _) => Err(format!(
                "{} functions are named {name}, so a probe could hit the wrong one",
                several.len()
            )),
        }
    }

    /// Says if there is exactly one function of this name.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }

    /// Says if there is something of a function, and yet it cannot be probed: the compiler has changed it, or there are several.
    pub fn is_refused(&self, name: &str) -> bool {
        self.own(name).next().is_some() && !self.has(name)
    }

    /// What there is of a function, but for what live patches put in its place.
    fn own(&self, name: &str) -> impl Iterator<Item = &Symbol> {
        let all = self.0.get(name).into_iter().flatten();
        all.filter(|symbol| !symbol.module.as_deref().is_some_and(is_live_patch))
    }

    /// Says if a function is in the kernel image.
    pub fn is_built_in(&self, name: &str) -> bool {
        let symbols = self.0.get(name).into_iter().flatten();
        symbols.into_iter().any(|symbol| symbol.module.is_none())
    }
}

/// Says if a module is a live patch: its functions are called in place of others of the same names.
fn is_live_patch(module: &str) -> bool {
    // As the tools that make them name them; the second is what the kernel says of those that are loaded.
    let names = ["livepatch", "klp", "kpatch"];
    names.iter().any(|name| module.starts_with(name))
        || Path::new("/sys/kernel/livepatch").join(module).is_dir()
}

/// Modules that some kernels have built in, and a function that then is in the image. Those without parameters or a version
/// have no folder in sysfs.
const BUILT_IN: [(&str, &str); 5] = [
    ("wireguard", "wg_packet_encrypt_worker"),
    ("esp4", "esp_input"),
    ("esp6", "esp6_input"),
    ("ib_core", "ib_modify_qp_with_udata"),
    ("gpu_sched", "drm_sched_job_init"),
];

/// Which of [`BUILT_IN`] this kernel has in its image. That stays.
fn built_in() -> &'static [&'static str] {
    static FOUND: OnceLock<Vec<&'static str>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let symbols = Symbols::of_kernel(BUILT_IN.map(|(_, function)| function));
        let symbols = symbols.unwrap_or_default();
        let found = BUILT_IN.iter();
        let found = found.filter(|(_, function)| symbols.is_built_in(function));
        found.map(|(module, _)| *module).collect()
    })
}

/// Says if a module is in the kernel image, of those for which that matters here.
pub fn is_built_in(module: &str) -> bool {
    built_in().contains(&module)
}

/// Identifies a load of a module: another one after a reload. `None` if it is not loaded. One that is built in always is.
///
/// sysfs numbers its files anew each time (kernfs ids are handed out in a cycle of 2^32).
pub fn loaded(module: &str) -> Option<u64> {
    let folder = Path::new("/sys/module").join(module);
    let load = fs::metadata(folder).ok().map(|metadata| metadata.ino());
    load.or_else(|| is_built_in(module).then_some(0))
}

/// Says if a module is neither on its way in nor on its way out. One that is built in always is.
pub fn settled(module: &str) -> bool {
    let state = Path::new("/sys/module").join(module).join("initstate");
    fs::read_to_string(state).map_or(true, |state| state.trim() == "live")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "0000000000000000 T ib_create_qp_user\t[ib_core]\n\
        0000000000000000 t create_qp\t[ib_core]\n\
        0000000000000000 t create_qp\t[ib_uverbs]\n\
        0000000000000000 T tcp_sendmsg\n\
        0000000000000000 d ib_modify_qp\t[ib_core]\n\
        garbage\n\
        0000000000000000 t cut";

    #[test]
    fn functions_are_found_with_their_module() {
        let wanted = [
            "ib_create_qp_user",
            "create_qp",
            "tcp_sendmsg",
            "ib_modify_qp",
            "cut",
        ];
        let symbols = Symbols::read(TEXT.as_bytes(), wanted).expect("readable");
        let function = symbols.find("ib_create_qp_user").expect("there");
        assert_eq!(function.target, "ib_core:ib_create_qp_user");
        assert_eq!(
            symbols.find("tcp_sendmsg").expect("there").target,
            "tcp_sendmsg"
        );
        assert!(
            symbols
                .find("create_qp")
                .expect_err("two")
                .contains("2 functions")
        );
        assert!(!symbols.has("ib_modify_qp"), "data is no function");
        assert!(symbols.has("cut") && !symbols.has("unasked"));
    }
    fn case(name: &str, wanted: &[&str]) -> Symbols {
        let path = format!(
            "{}/tests/cases/{name}/kallsyms.txt",
            env!("CARGO_MANIFEST_DIR")
        );
        let text = fs::read(path).expect("a case");
        Symbols::read(&text[..], wanted.iter().copied()).expect("readable")
    }

    #[test]
    fn what_a_compiler_has_made_of_a_name_is_told_from_what_it_has_made_of_a_function() {
        let wanted = [
            "encrypt_packet",
            "decrypt_packet",
            "chrdev_open",
            "xfrm_state_add",
        ];
        let symbols = case("compiler-suffix", &wanted);
        let target = |name| symbols.find(name).map(|function| function.target);
        assert_eq!(
            target("encrypt_packet").as_deref(),
            Ok("wireguard:encrypt_packet.llvm.1234567890123456789")
        );
        assert_eq!(
            target("xfrm_state_add").as_deref(),
            Ok("xfrm_state_add"),
            "not the live patch's"
        );
        let why = target("chrdev_open").expect_err("changed");
        assert!(
            why.contains("the compiler has made chrdev_open.constprop.0"),
            "{why}"
        );
        assert!(symbols.is_refused("chrdev_open") && !symbols.is_refused("decrypt_packet"));
        assert!(target("decrypt_packet").is_err());

        let text = "0 t f.isra.0\t[m]\n0 t f.isra.0.cold\t[m]\n0 t g\t[m]\n0 t g.constprop.1\t[m]\n0 t g.cold\t[m]\n\
            0 t h.cold\t[m]\n0 t i.llvm.1\t[m]\n0 t i.llvm.2\t[n]\n0 t j.__uniq.12.llvm.3\t[m]\n0 t k.lto_priv.0\n\
            0 t l\t[m]\n0 t l\t[klp_l]\n0 t n.cfi_jt\n";
        let wanted = ["f", "g", "h", "i", "j", "k", "l", "n"];
        let symbols = Symbols::read(text.as_bytes(), wanted).expect("readable");
        let told = |name| match symbols.find(name) {
            Ok(function) => function.target,
            Err(why) => why.split(':').next().unwrap_or_default().to_owned(),
        };
        for (name, expected) in [
            (
                "f",
                "the compiler has made f.isra.0 of f, whose arguments may be others",
            ),
            ("g", "m:g"),
            (
                "h",
                "the compiler has left only h.cold of h, which is a part of it",
            ),
            (
                "i",
                "2 functions are named i, so a probe could hit the wrong one",
            ),
            ("j", "m:j.__uniq.12.llvm.3"),
            ("k", "k.lto_priv.0"),
            ("l", "m:l"),
            (
                "n",
                "the compiler has made n.cfi_jt of n, whose arguments may be others",
            ),
        ] {
            assert_eq!(told(name), expected);
        }
    }

    #[test]
    fn what_is_in_the_image_is_there_without_its_module() {
        let symbols = case(
            "esp-built-in",
            &["esp_input", "esp6_input", "xfrm_state_add"],
        );
        assert!(symbols.is_built_in("esp_input"));
        assert!(!symbols.is_built_in("esp6_input"));
        let modules = Symbols::read(TEXT.as_bytes(), ["create_qp"]).expect("readable");
        assert!(!modules.is_built_in("create_qp"));
    }
}
