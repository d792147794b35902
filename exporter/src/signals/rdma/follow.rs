// SPDX-License-Identifier: Apache-2.0
//! What comes and goes with the modules of RDMA?

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use exporter_common::Loss;

use super::{
    OBJECT,
    host::{DeviceMap, Owners, PairMaps},
    live::{Live, Reading},
    programs::{CREATE_KERNEL, MODULES, programs, resolve, types_of_module},
};
use crate::{
    hook::{Hook, Program, Reason},
    kernel::{
        Kernel,
        btf::Btf,
        symbols::{self, Symbols},
    },
    lock::lock,
    probe::{self, Attached, Constants, Health},
    signals::{
        State, Status,
        follow::{self, Follower, Loads},
    },
};

/// What is read.
pub(super) struct Core {
    pub(super) live: Option<Live>,
    pub(super) owners: Arc<Owners>,
    /// Readings of objects that were dropped, for the next scrape.
    pub(super) farewells: Vec<Reading>,
    /// What dropped objects told of themselves, and what was swept up of all as returns that were missed.
    health: Health,
}

impl Core {
    pub(super) fn new(owners: Arc<Owners>) -> Self {
        Self {
            live: None,
            owners,
            farewells: Vec::new(),
            health: Health::default(),
        }
    }

    /// Calls whose return was missed have been swept up.
    pub(super) fn swept(&mut self, calls: u64) {
        self.health.losses[Loss::MissedReturn] += calls;
    }

    fn drop_live(&mut self) {
        let Some(live) = self.live.take() else {
            return;
        };
        match live.reading(&self.owners) {
            Ok(reading) => self.farewells.push(reading),
            Err(error) => tracing::error!("signal rdma: the last counts are lost: {error:#}"),
        }
        match live.attached.health() {
            Ok(health) => self.health += health,
            Err(error) => tracing::error!("signal rdma: the last losses are lost: {error:#}"),
        }
        self.owners.replace(None);
    }
}

impl follow::Core for Core {
    fn health(&self) -> anyhow::Result<Health> {
        let live = self.live.as_ref().map(|live| &live.attached);
        follow::health_of(self.health.clone(), live)
    }
}

/// What follows the modules.
pub(super) struct Modules {
    status: Status,
    loads: Loads<{ MODULES.len() }>,
    owners: Arc<Owners>,
}

impl Follower<Core> for Modules {
    /// Attaches to what has been loaded, and lets go of what has been unloaded.
    fn follow(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) -> Status {
        // Held from before it is looked: no scrape takes what is there for what belongs to the modules of now.
        let mut core = lock(core);
        let lacks = |hook: &Hook| hook.reason != Reason::Attached;
        let is_complete = !self.status.hooks.iter().any(lacks);
        if let Some(before) = self.loads.look(is_complete) {
            self.change(&mut core, before[0], kernel);
            if symbols::loaded(MODULES[0]) != self.loads.now()[0] {
                // It went while it was hooked, of which the kernel tells next.
                self.status = Status::bare(State::Absent);
            }
        }
        self.status.clone()
    }
}

impl Modules {
    pub(super) fn new(owners: Arc<Owners>) -> Self {
        Self {
            status: Status::bare(State::Absent),
            loads: Loads::of(MODULES),
            owners,
        }
    }

    /// `before` is the load of ib_core that the object is of.
    fn change(&mut self, core: &mut Core, before: Option<u64>, kernel: &dyn Fn() -> Kernel) {
        let now = self.loads.now()[0];
        if now.is_none() {
            core.drop_live();
            self.status = Status::bare(State::Absent);
            return;
        }
        let kernel = kernel();
        if now == before
            && let Some(live) = &mut core.live
        {
            self.status.hooks = live.attached.follow_modules(&live.programs, &kernel);
            return;
        }
        core.drop_live();
        core.live = self.load(&kernel);
        if core.live.is_none() && !symbols::settled(MODULES[0]) {
            // On its way in or out: not failed, but to be looked at again.
            self.loads.forget();
            self.status = Status::bare(State::Absent);
        }
    }

    fn load(&mut self, kernel: &Kernel) -> Option<Live> {
        let types = types_of_module(kernel);
        let has_number = |types: &Btf| types.field("ib_qp", "qp_num").is_ok();
        let numbered = types.as_deref().is_ok_and(has_number);
        let names = ["ib_create_qp_user", CREATE_KERNEL, "ib_create_qp_security"];
        let symbols = Symbols::of_kernel(names).unwrap_or_default();
        let programs = programs(&symbols, numbered);
        let types = types.as_deref().map_err(String::as_str);
        let by_core = programs.iter().any(|program| program.name == "create");
        let constants = |constants: &mut Constants<'_>| {
            constants.set("CORE_CREATES", u32::from(by_core));
            resolve(constants);
        };
        let mut outcome = probe::attach(OBJECT, &programs, types, constants, kernel);
        // All are missing for one reason, or none is.
        outcome.notes.truncate(1);
        for why in &mut outcome.notes {
            *why = format!(
                "ib_core tells no types ({why}): queue pairs older than the exporter end as unknown"
            );
        }
        let build = |attached| self.build(attached, programs.clone(), numbered);
        let (status, live) = Status::of(outcome, build);
        self.status = status;
        live
    }

    fn build(
        &self,
        mut attached: Attached,
        programs: Vec<Program>,
        numbered: bool,
    ) -> anyhow::Result<Live> {
        let named = attached
            .values()
            .iter()
            .any(|(name, _)| *name == "OFF_DEVICE_NAME");
        let pairs = PairMaps {
            pairs: attached.map("PAIRS")?,
            old: attached.map("OLD_PAIRS")?,
            missing: HashSet::new(),
            numbered,
        };
        let devices = DeviceMap {
            devices: attached.map("DEVICES")?,
            named,
        };
        let live = Live::new(attached, programs)?;
        self.owners.replace(Some((pairs, devices)));
        Ok(live)
    }
}
