// SPDX-License-Identifier: Apache-2.0
//! What do WireGuard and IPsec cost, whose traffic is it, and are sessions derived too often?
//!
//! Hooks: kprobes and kretprobes on functions of wireguard, esp4 and esp6, and on those of the kernel that install
//! security associations (`programs`). Metrics: `chandra_encryption_*`.
//!
//! A packet belongs to the pod that has its inner address: the source of what is encrypted, the destination of what is
//! decrypted. A packet that still has its socket belongs to the socket's cgroup, which tells apart pods in the host's
//! network. An address has its owner at the time of the packet: before addresses change hands, what was counted for the
//! old owners is read ([`Drain`]). One that no running pod holds is the host's, if it is an address of this node, and
//! nobody's otherwise.
//!
//! The modules are never held: they can be unloaded at any time, and when they come back the hooks do.

mod addresses;
mod books;
mod follow;
mod live;
pub(crate) mod metrics;
mod peers;
mod programs;
mod sessions;
mod told;

use std::sync::Arc;

use aya::include_bytes_aligned;

pub use self::{
    books::{Books, Counted, Holders, Room},
    metrics::{SHOWN_PEERS, SLOTS, render, render_sessions},
    peers::PeerLabels,
};
use self::{
    follow::{Core, Drained, Modules},
    metrics::units,
    sessions::Sessions,
};
use super::{
    Attempt, Entry, Options, Read, Scope, Signal, State, Status,
    follow::{Following, modules},
};
use crate::{
    capabilities::{BPF, KPROBES, PERFMON},
    families::Families,
    kernel::Kernel,
    ledger::{Attribution, Ledger, Opening},
    pods::Drain,
    probe::Health,
};

/// The signal.
pub const ENTRY: Entry = Entry {
    name: "encryption",
    question: "What do WireGuard and IPsec cost, whose traffic is it, and are sessions derived too often?",
    descs: metrics::DESCS,
    objects: &[OBJECT],
    needs: &[BPF, PERFMON, KPROBES],
    attach,
};

static OBJECT: &[u8] =
    include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/encryption.o"));

/// What the signal looks at, and how closely.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Of how many packets one is timed.
    pub timed_every: u32,
    /// UDP port of VXLAN inside the encryption.
    pub vxlan_port: u16,
    /// UDP port of Geneve inside the encryption.
    pub geneve_port: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            timed_every: 32,
            vxlan_port: 8472,
            geneve_port: 6081,
        }
    }
}

fn attach(kernel: &Kernel, options: &Options) -> Attempt {
    let following = Following::start(
        ENTRY.name,
        Core::default(),
        Modules::new(options.encryption),
        Some(kernel),
        modules(ENTRY.name),
    );
    Attempt::following(following.map(|following| Encryption {
        drain: Arc::new(Drained(following.core())),
        following,
        ledger: Ledger::new(options.max_owners, units).opening(Opening::Events),
        sessions: Sessions::default(),
    }))
}

struct Encryption {
    following: Following<Core>,
    drain: Arc<dyn Drain>,
    ledger: Ledger<usize, SLOTS>,
    sessions: Sessions,
}

impl Signal for Encryption {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        self.following.read(|core| {
            if core.live.is_some() {
                core.list_host(scope.now);
            }
            let holders = Holders::new(scope.pods, &core.host);
            if let Some(live) = &core.live {
                let work = live.work()?;
                let senders = work.iter().map(|((_, flow), _)| flow.cgroup);
                senders.for_each(|cgroup| scope.note(cgroup));
                core.books.book(&work, &holders, scope.now);
            }
            core.books
                .settle(&mut self.ledger, &holders, scope.retention, scope.now);
            let Some(live) = &mut core.live else {
                return Ok(());
            };
            live.tell(&holders)?;
            for counted in core.books.idle(scope.retention, &holders, scope.now) {
                live.remove(counted)?;
                core.books.forget(&counted);
            }
            self.sessions
                .read(live, &core.interfaces, &core.host, scope)
        })
    }

    fn render(&self, families: &mut Families) {
        if self.following.state() == State::Absent && self.sessions.is_empty() {
            return;
        }
        render(self.ledger.accounts(), families);
        self.sessions.render(families);
    }

    fn attribution(&self) -> Attribution {
        self.ledger.attribution()
    }

    fn health(&self) -> anyhow::Result<Health> {
        Ok(self.following.health())
    }

    fn drain(&self) -> Option<Arc<dyn Drain>> {
        Some(Arc::clone(&self.drain))
    }

    fn status(&self) -> Option<Status> {
        Some(self.following.status())
    }
}
