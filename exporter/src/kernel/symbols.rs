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
};

/// Where each of some functions lives.
#[derive(Debug, Default)]
pub struct Symbols(HashMap<String, Vec<Option<String>>>);

/// A function that can be named for a kprobe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its module; `None` for the kernel image.
    pub module: Option<String>,
    /// As perf_event_open(2) takes it: `module:function`.
    pub target: String,
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
        let mut found: HashMap<String, Vec<Option<String>>> = wanted
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
                && let Some(places) = found.get_mut(name)
            {
                let module = fields
                    .next()
                    .map(|module| module.trim_matches(['[', ']']).to_owned());
                places.push(module);
            }
            line.clear();
        }
        Ok(Self(found))
    }

    /// Returns where a function lives.
    ///
    /// # Errors
    /// One line, where there is none of this name or more than one.
    pub fn find(&self, name: &str) -> Result<Function, String> {
        match self.0.get(name).map(Vec::as_slice) {
            None | Some([]) => Err(format!("no loaded module has a function {name}")),
            Some([module]) => Ok(Function {
                module: module.clone(),
                target: module
                    .as_ref()
                    .map_or_else(|| name.to_owned(), |module| format!("{module}:{name}")),
            }),
            Some(places) => Err(format!(
                "{} functions are named {name}, so a probe could hit the wrong one",
                places.len()
            )),
        }
    }

    /// Says if there is exactly one function of this name.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }
}

/// Identifies a load of a module: another one after a reload. `None` if it is not loaded.
///
/// sysfs numbers its files anew each time (kernfs ids are handed out in a cycle of 2^32).
pub fn loaded(module: &str) -> Option<u64> {
    let folder = Path::new("/sys/module").join(module);
    fs::metadata(folder).ok().map(|metadata| metadata.ino())
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
}
