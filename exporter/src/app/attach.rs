// SPDX-License-Identifier: Apache-2.0
//! How do the signals come to be read?

use std::{sync::Arc, thread};

use crate::{
    args::Serve,
    kernel::{Hierarchy, Kernel},
    libraries::Gate,
    pods::{Pods, cgroups},
    scrape::{Exporter, Front},
    server::Site,
    signals::{
        Options, State, encryption, gpu, nccl, rdma,
        running::{self, Running},
    },
    web::Web,
};

/// Walks the cgroups, attaches the signals and reads them once; from then on everything is served, and processes are looked into.
pub(super) fn attach(args: &Serve, pods: Arc<Pods>, web: Arc<Web>, front: &Front) {
    let gate = Arc::new(Gate::default());
    let mut kernel = Kernel::read();
    let mut hierarchy = Hierarchy::of_host(args.cgroupfs.as_deref());
    if let Some(trouble) = hierarchy.trouble() {
        tracing::warn!("{trouble}");
    }
    let bell = follow_cgroups(&mut hierarchy, &pods);
    let signals = running::attach(&kernel, &args.disable, &options(args, &hierarchy, &gate));
    signals.iter().for_each(tell);
    kernel.forget_types();
    let exporter = Arc::new(Exporter::new(
        signals, pods, web, bell, &kernel, &hierarchy, args,
    ));
    if let Err(error) = exporter.metrics() {
        tracing::error!("the first reading: {error:#}");
    }
    front.begin(exporter);
    gate.open();
}

/// What the signals are told.
fn options(args: &Serve, hierarchy: &Hierarchy, gate: &Arc<Gate>) -> Options {
    Options {
        max_owners: args.max_owners,
        cgroups: match hierarchy {
            Hierarchy::V2 { root, .. } => Some(root.clone()),
            _ => None,
        },
        rdma: rdma::Settings {
            // What a short job counts is shown before it is forgotten.
            zero_for: args.rdma_zero_for.min(args.retention / 2),
        },
        encryption: encryption::Settings {
            timed_every: args.timed_every,
            vxlan_port: args.vxlan_port,
            geneve_port: args.geneve_port,
        },
        gpu: gpu::Settings {
            devices: args.gpu_devices.clone(),
            calls: args.cuda_calls.then_some(args.cuda_budget),
        },
        nccl: nccl::Settings {
            salt: args.nccl_salt.clone(),
        },
        gate: Arc::clone(gate),
        show_paths: args.show_paths,
    }
}

/// Logs what came of a signal.
fn tell(running: &Running) {
    let (name, state) = (running.entry.name, running.status.state);
    tracing::info!("signal {name}: {}", state.label());
    let hooks = running.status.hooks.iter();
    let mut details: Vec<_> = hooks.map(|hook| &hook.detail).collect();
    // What fails the whole object is the detail of every hook.
    details.dedup();
    for detail in details.into_iter().filter(|detail| !detail.is_empty()) {
        if state == State::Failed {
            tracing::error!("signal {name}: {detail}");
        } else {
            tracing::warn!("signal {name}: {detail}");
        }
    }
    for note in &running.status.notes {
        tracing::warn!("signal {name} works with less: {note}");
    }
}

/// Has cgroups followed, where there is a hierarchy that can be.
fn follow_cgroups(hierarchy: &mut Hierarchy, pods: &Arc<Pods>) -> Option<cgroups::Bell> {
    if let Hierarchy::V2 { root, .. } = hierarchy {
        match cgroups::Watcher::new(root.clone(), Arc::clone(pods)) {
            Ok(watcher) => {
                let bell = watcher.bell();
                let thread = thread::Builder::new()
                    .name("cgroups".to_owned())
                    .stack_size(512 << 10);
                match thread.spawn(move || watcher.run()) {
                    Ok(_) => return Some(bell),
                    Err(error) => {
                        tracing::error!("cannot start the thread that follows cgroups: {error}")
                    }
                }
            }
            Err(error) => {
                tracing::error!("{error:#}");
                *hierarchy = Hierarchy::Absent;
            }
        }
    }
    pods.without_cgroups();
    None
}
