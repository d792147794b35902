// SPDX-License-Identifier: Apache-2.0
//! Whose queue pairs come and go, fail, or are slow to connect?
//!
//! Hooks: kprobes and kretprobes on functions of ib_core, ib_uverbs and rdma_cm (`programs`), and RDMA netlink for
//! the gauge. Metrics: `chandra_rdma_*`.
//!
//! Counted are the queue pairs that user space makes through the kernel; an event belongs to the cgroup that created the
//! pair, whoever modifies or destroys it. Neither hooks nor netlink see what a process makes past the kernel's verbs
//! (DEVX objects of mlx5, and NVSHMEM's IBGDA on top of them). Counters of ports and congestion are node_exporter's
//! (`node_infiniband_*`).
//!
//! The modules are never held: they can be unloaded at any time, and when they come back the hooks do.

mod devices;
pub mod enumeration;
mod follow;
mod gauge;
pub mod host;
mod live;
pub(crate) mod metrics;
pub mod nldev;
mod programs;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::Context;
use aya::include_bytes_aligned;

pub use self::metrics::{SLOTS, render, render_devices, render_gauge};
use self::{
    devices::Devices,
    enumeration::{Enumeration, Limits},
    follow::{Core, Modules},
    gauge::Gauge,
    host::{Host, Owners},
    metrics::units,
};
use super::{
    Attempt, Entry, Options, Read, Scope, Signal, State, Status,
    follow::{Following, modules},
};
use crate::{
    capabilities::{BPF, NAMESPACES, NAMESPACES_OF_OTHERS, PERFMON},
    families::Families,
    hook::{Hook, Method, Reason},
    kernel::Kernel,
    ledger::{Attribution, Ledger, Opening},
    probe::Health,
};

/// The signal.
pub const ENTRY: Entry = Entry {
    name: "rdma",
    question: "Whose queue pairs come and go, fail, or are slow to connect?",
    descs: metrics::DESCS,
    objects: &[OBJECT],
    needs: &[BPF, PERFMON, NAMESPACES, NAMESPACES_OF_OTHERS],
    attach,
};

/// How the signal shows what is new.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// How long what a new account has is shown at 0.
    pub zero_for: Duration,
}

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/rdma.o"));

fn attach(kernel: &Kernel, options: &Options) -> Attempt {
    Attempt::following(Rdma::new(kernel, options))
}

struct Rdma {
    following: Following<Core>,
    enumeration: Enumeration,
    /// What is wrong with the enumeration.
    troubles: Vec<String>,
    ledger: Ledger<u64, SLOTS>,
    max_owners: usize,
    devices: Devices,
    gauge: Gauge,
}

impl Rdma {
    fn new(kernel: &Kernel, options: &Options) -> anyhow::Result<Self> {
        let owners = Arc::new(Owners::default());
        let following = Following::start(
            ENTRY.name,
            Core::new(Arc::clone(&owners)),
            Modules::new(Arc::clone(&owners)),
            Some(kernel),
            modules(ENTRY.name),
        )?;
        let host = Host {
            owners,
            cgroups: options.cgroups.clone(),
        };
        let enumeration = Enumeration::start(host, Limits::default())
            .context("start the thread that enumerates queue pairs")?;
        // The first scrape has something to show.
        enumeration.ask();
        Ok(Self {
            following,
            enumeration,
            troubles: Vec::new(),
            ledger: Ledger::new(options.max_owners, units)
                .opening(Opening::Events)
                .new_for(options.rdma.zero_for),
            max_owners: options.max_owners,
            devices: Devices::new(),
            gauge: Gauge::default(),
        })
    }
}

impl Signal for Rdma {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        self.enumeration.ask();
        let reports = self.enumeration.reports(scope.now);
        self.troubles = self.enumeration.troubles(scope.now);
        let listed: BTreeSet<_> = reports.iter().map(|report| report.device.clone()).collect();
        self.gauge
            .count(reports, &mut self.devices, self.max_owners, scope);
        self.following.read(|core| {
            for farewell in std::mem::take(&mut core.farewells) {
                self.devices.book(farewell.devices, scope.now);
                self.devices.restart();
                scope.book_totals(&mut self.ledger, farewell.usage);
                self.ledger.restart();
            }
            let Some(live) = &mut core.live else {
                scope.book_totals(&mut self.ledger, []);
                return Ok(());
            };
            self.devices.book(core.owners.devices()?, scope.now);
            self.devices.make_room(&core.owners, &listed);
            scope.book(&mut self.ledger, &mut live.usage, |usage| usage.slots)?;
            let calls = live.sweep();
            core.swept(calls);
            Ok(())
        })
    }

    fn render(&self, families: &mut Families) {
        if self.following.state() == State::Absent && self.devices.totals().is_empty() {
            return;
        }
        let is_new = |owner: &_| self.ledger.is_new(owner);
        render(self.ledger.accounts(), is_new, families);
        render_devices(self.devices.totals(), families);
        self.gauge.render(families);
    }

    fn attribution(&self) -> Attribution {
        self.ledger.attribution()
    }

    fn health(&self) -> anyhow::Result<Health> {
        Ok(self.following.health())
    }

    fn status(&self) -> Option<Status> {
        let mut status = self.following.status();
        if status.state != State::Absent {
            status.hooks.push(Hook {
                name: "RDMA_NLDEV_CMD_RES_QP_GET",
                method: Method::Netlink,
                reason: match self.troubles.is_empty() {
                    true => Reason::Attached,
                    false => Reason::Failed,
                },
                detail: self.troubles.join("; "),
            });
        }
        Some(status)
    }
}
