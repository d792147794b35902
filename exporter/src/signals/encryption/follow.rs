// SPDX-License-Identifier: Apache-2.0
//! What comes and goes with the modules that encrypt, and what is read when addresses change hands?

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::{
    OBJECT, Settings,
    addresses::{host_addresses, interfaces, of_host},
    books::{Books, Holders},
    live::Live,
    programs::{MODULES, PROGRAMS, resolve},
};
use crate::{
    hook::{Hook, Method, Reason},
    kernel::Kernel,
    lock::{lock, try_lock},
    pods::{Drain, View},
    probe::{self, Constants, Health},
    signals::{
        State, Status,
        follow::{self, Follower, Loads},
    },
};

/// How old the lists of the node's addresses and interfaces may be.
const HOST_EVERY: Duration = Duration::from_secs(10);

/// What is read, by scrapes and before addresses change hands.
#[derive(Default)]
pub(super) struct Core {
    pub(super) live: Option<Live>,
    pub(super) books: Books,
    pub(super) host: HashSet<IpAddr>,
    pub(super) interfaces: HashSet<String>,
    /// When the node's addresses and interfaces were read.
    listed: Option<Instant>,
}

impl Core {
    /// Reads the node's addresses and interfaces anew, if the lists are old.
    pub(super) fn list_host(&mut self, now: Instant) {
        let stale = self
            .listed
            .is_none_or(|at| now.saturating_duration_since(at) >= HOST_EVERY);
        if stale {
            self.host = host_addresses();
            let names = of_host("dev");
            self.interfaces = interfaces(&names).map(str::to_owned).collect();
            self.listed = Some(now);
        }
    }
}

impl follow::Core for Core {
    fn health(&self) -> anyhow::Result<Health> {
        let live = self.live.as_ref().map(|live| &live.attached);
        follow::health_of(Health::default(), live)
    }
}

/// What follows the modules.
pub(super) struct Modules {
    settings: Settings,
    status: Status,
    loads: Loads<{ MODULES.len() }>,
}

impl Follower<Core> for Modules {
    /// Attaches to what has been loaded, and lets go of what has been unloaded. The object stays: it has counted.
    fn follow(&mut self, core: &Mutex<Core>, kernel: &dyn Fn() -> Kernel) -> Status {
        let mut core = lock(core);
        let is_complete = self.loads.are_absent() || core.live.is_some() && self.complete();
        if self.loads.look(is_complete).is_none() {
            return self.status.clone();
        }
        let absent = self.loads.are_absent();
        let kernel = kernel();
        match &mut core.live {
            Some(live) => self.status.hooks = live.attached.follow_modules(PROGRAMS, &kernel),
            None if absent => {}
            None => core.live = self.load(&kernel),
        }
        self.tell_inlined();
        self.status.state = match (absent, core.live.is_some()) {
            (true, _) => State::Absent,
            (false, true) if self.works() => State::Up,
            // On its way in or out: to be looked at again.
            (false, true) if self.loads.may_settle() => State::Absent,
            (false, _) => State::Failed,
        };
        self.status.clone()
    }
}

impl Modules {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            status: Status::bare(State::Absent),
            loads: Loads::of(MODULES.map(|(module, _)| module)),
        }
    }

    /// Says if each module that is loaded has all the hooks that it should have.
    fn complete(&self) -> bool {
        self.loaded()
            .all(|(_, needs)| needs.iter().all(|function| self.has(function)))
    }

    /// Says if each module that is loaded works.
    fn works(&self) -> bool {
        let hooks = &self.status.hooks;
        self.loaded().all(|(_, needs)| works(hooks, needs))
    }

    /// The modules that are loaded, with the functions that each is hooked in.
    fn loaded(&self) -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
        let modules = MODULES.iter().zip(self.loads.now());
        modules
            .filter(|(_, load)| load.is_some())
            .map(|(module, _)| *module)
    }

    fn has(&self, function: &str) -> bool {
        has(&self.status.hooks, function)
    }

    /// Tells of functions that a module should have and nothing is known of: they are inlined into their callers.
    fn tell_inlined(&mut self) {
        if self.loads.may_settle() {
            return;
        }
        let is_told = |function: &str| self.status.hooks.iter().any(|hook| hook.name == function);
        let needs = self
            .loaded()
            .flat_map(|(module, needs)| needs.iter().map(move |need| (module, *need)));
        let inlined = needs.filter(|(_, function)| !is_told(function));
        let hooks: Vec<_> = inlined
            .map(|(module, function)| Hook {
                name: function,
                method: Method::Kprobe,
                reason: Reason::NoHook,
                detail: format!(
                    "{module} has no function {function}, which the compiler has put into its callers: what passes it is not counted"
                ),
            })
            .collect();
        self.status.hooks.extend(hooks);
    }

    fn load(&mut self, kernel: &Kernel) -> Option<Live> {
        let settings = self.settings;
        let constants = |constants: &mut Constants<'_>| resolve(constants, kernel, &settings);
        let outcome = probe::attach(OBJECT, PROGRAMS, kernel.types(), constants, kernel);
        let (status, live) = Status::of(outcome, Live::build);
        self.status = status;
        live
    }
}

/// Says if a function has all of its hooks.
fn has(hooks: &[Hook], function: &str) -> bool {
    let mut hooks = hooks.iter().filter(|hook| hook.name == function).peekable();
    hooks.peek().is_some() && hooks.all(|hook| hook.reason == Reason::Attached)
}

/// Says if some of the functions that a module should be hooked in are, and others are not only since a compiler has left none of them
/// to hook.
fn works(hooks: &[Hook], needs: &[&str]) -> bool {
    let mut of_needs = hooks.iter().filter(|hook| needs.contains(&hook.name));
    of_needs.all(|hook| matches!(hook.reason, Reason::Attached | Reason::NoHook))
        && needs.iter().any(|function| has(hooks, function))
}

/// Reads what was counted before addresses change hands.
pub(super) struct Drained(pub(super) Arc<Mutex<Core>>);

impl Drain for Drained {
    fn drain(&self, pods: &View<'_>) {
        let mut core = lock(&self.0);
        let core = &mut *core;
        let Some(live) = &core.live else {
            return;
        };
        match live.work() {
            Ok(work) => {
                let now = Instant::now();
                core.list_host(now);
                core.books.book(&work, &Holders::new(pods, &core.host), now);
                core.books.close();
            }
            Err(error) => tracing::error!(
                "signal encryption: addresses change hands, and what was counted cannot be read: {error:#}"
            ),
        }
    }

    fn changed(&self, pods: &View<'_>) {
        Self::tell(&mut lock(&self.0), pods);
    }

    fn met(&self, pods: &View<'_>) {
        // Who is at work on it for long tells next, by a scrape.
        if let Some(mut core) = try_lock(&self.0) {
            Self::tell(&mut core, pods);
        }
    }
}

impl Drained {
    fn tell(core: &mut Core, pods: &View<'_>) {
        if let Some(live) = &mut core.live
            && let Err(error) = live.tell(&Holders::new(pods, &core.host))
        {
            tracing::error!(
                "signal encryption: a new address or cgroup is a stranger's until the next scrape: {error:#}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inlined_function_costs_itself_and_a_refused_program_the_signal() {
        const NEEDS: [&str; 3] = ["encrypt", "decrypt", "session"];
        let hooks = |reasons: [Reason; 3]| -> Vec<Hook> {
            let all = NEEDS.into_iter().zip(reasons);
            let hook = |(name, reason)| Hook {
                name,
                method: Method::Kprobe,
                reason,
                detail: String::new(),
            };
            all.map(hook).collect()
        };
        use Reason::{Attached, NoField, NoHook, Rejected};
        for (reasons, expected) in [
            ([Attached, Attached, Attached], true),
            ([Attached, NoHook, Attached], true),
            ([NoHook, NoHook, NoHook], false),
            ([Attached, Rejected, Attached], false),
            ([NoField, NoField, Attached], false),
        ] {
            assert_eq!(works(&hooks(reasons), &NEEDS), expected, "{reasons:?}");
        }
        assert!(!works(&[], &NEEDS), "nothing is attached");
        assert!(!has(&hooks([Attached, NoHook, Attached]), "decrypt"));
    }
}
