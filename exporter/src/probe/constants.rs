// SPDX-License-Identifier: Apache-2.0
//! Where are the fields of the running kernel that an object reads?

use crate::{hook::Program, kernel::btf::Btf};

/// The constants of an object, resolved from the running kernel.
#[derive(Debug)]
pub struct Constants<'a> {
    types: Result<&'a Btf, &'a str>,
    values: Vec<(&'static str, u32)>,
    missing: Vec<(&'static str, String)>,
}

impl<'a> Constants<'a> {
    /// None yet.
    pub(super) fn new(types: Result<&'a Btf, &'a str>) -> Self {
        Self {
            types,
            values: Vec::new(),
            missing: Vec::new(),
        }
    }

    /// The kernel's types, for what [`Self::offset`] does not cover, or why they cannot be read.
    pub fn btf(&self) -> Result<&'a Btf, &'a str> {
        self.types
    }

    /// Sets a constant to a value.
    pub fn set(&mut self, constant: &'static str, value: u32) {
        self.values.push((constant, value));
    }

    /// Sets a constant to the byte offset of a member, the sum of the offsets where several are named (a struct that
    /// lies in a buffer of another). Says if it could.
    pub fn offset(&mut self, constant: &'static str, members: &[(&str, &str)]) -> bool {
        let offsets = self.types.map_err(str::to_owned).and_then(|types| {
            let offset = |(name, path): &(&str, &str)| {
                let field = types.field(name, path);
                field
                    .map(|field| field.offset)
                    .map_err(|error| error.to_string())
            };
            members.iter().map(offset).collect::<Result<Vec<u32>, _>>()
        });
        match offsets {
            Ok(offsets) => self.set(constant, offsets.iter().sum()),
            Err(why) => {
                self.lack(constant, why);
                return false;
            }
        }
        true
    }

    /// Sets what the kernel half needs to find a socket's cgroup.
    ///
    /// From 5.15 `sk_cgrp_data.cgroup` is a pointer (commit 8520e224f547, also in late 5.10.y: Debian's 5.10.262 has
    /// it); before, `sk_cgrp_data.val` is a word of pointer and flags. The kernel half does without the owner where OFF_SOCK_CGROUP is absent, so it is set only
    /// with the other two.
    pub fn socket_cgroup(&mut self) {
        let typed = self.types.is_ok_and(|types| {
            types
                .field("sock", "sk_cgrp_data.cgroup")
                .is_ok_and(|field| field.pointer)
        });
        self.set("SOCK_CGROUP_TYPED", u32::from(typed));
        let member = if typed {
            "sk_cgrp_data.cgroup"
        } else {
            "sk_cgrp_data.val"
        };
        if self.offset("OFF_CGROUP_KN", &[("cgroup", "kn")])
            && self.offset("OFF_KERNFS_ID", &[("kernfs_node", "id")])
        {
            self.offset("OFF_SOCK_CGROUP", &[("sock", member)]);
        }
    }

    /// Sets what the kernel half needs to find a task's cgroup. It does without where OFF_TASK_CGROUPS is absent.
    pub fn task_cgroup(&mut self) {
        if self.offset("OFF_SET_CGROUP", &[("css_set", "dfl_cgrp")])
            && self.offset("OFF_CGROUP_KN", &[("cgroup", "kn")])
            && self.offset("OFF_KERNFS_ID", &[("kernfs_node", "id")])
        {
            self.offset("OFF_TASK_CGROUPS", &[("task_struct", "cgroups")]);
        }
    }

    /// Notes that a constant cannot be resolved; the object's default says that it is absent.
    pub fn lack(&mut self, constant: &'static str, why: String) {
        self.missing.push((constant, why));
    }

    /// What has been resolved.
    pub(super) fn values(&self) -> &[(&'static str, u32)] {
        &self.values
    }

    /// Why a program cannot be used, if it cannot.
    pub(super) fn lacks(&self, program: &Program) -> Option<&str> {
        let mut missing = self.missing.iter();
        let lacks = missing.find(|(constant, _)| program.needs.contains(constant));
        lacks.map(|(_, why)| why.as_str())
    }

    /// What could not be resolved and no program needs, and why.
    pub(super) fn missing_besides(self, programs: &[Program]) -> Vec<String> {
        let needed = |constant: &str| {
            let mut programs = programs.iter();
            programs.any(|program| program.needs.contains(&constant))
        };
        let missing = self.missing.into_iter();
        let besides = missing.filter(|(constant, _)| !needed(constant));
        besides.map(|(_, why)| why).collect()
    }
}
