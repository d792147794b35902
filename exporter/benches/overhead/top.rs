// SPDX-License-Identifier: Apache-2.0
//! What does `chandra top` cost while it shows a node with many pods?

use std::{
    fmt::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use chandra::{
    server::{Limits, Site, bind, serve},
    web::Web,
};
use tokio::runtime::Runtime;

use crate::{aim, common::build, exporter::cpu, note, screen::Tmux};

/// Pods of the node, and how many of them have RDMA, a GPU and a rank of NCCL as well.
const PODS: usize = 1000;
const RANKS: usize = 64;

/// How long it is watched, after its first screen.
const WATCHED: Duration = Duration::from_secs(30);

/// An exporter's page that grows.
struct Page(AtomicU64);

impl Site for Page {
    fn metrics(&self) -> anyhow::Result<Vec<u8>> {
        let at = self.0.fetch_add(1, Ordering::Relaxed);
        let mut page = String::from("chandra_build_info{version=\"bench\"} 1\n");
        for signal in ["encryption", "gpu", "nccl", "rdma", "tcp"] {
            writeln!(
                page,
                "chandra_signal_state{{signal=\"{signal}\",state=\"up\"}} 1"
            )?;
        }
        for pod in 0..PODS {
            of_pod(&mut page, pod, at)?;
        }
        Ok(page.into_bytes())
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    fn landing(&self) -> String {
        String::new()
    }
}

/// The series of a pod that the exporter would have of it, those too that top passes over.
fn of_pod(page: &mut String, pod: usize, at: u64) -> std::fmt::Result {
    let labels =
        format!("namespace=\"inference\",pod=\"vllm-llama-70b-{pod:04}-x2x9k\",container=\"main\"");
    let value = at * (pod as u64 % 7);
    for kind in ["syn", "synack", "rto", "fast", "probe"] {
        writeln!(
            page,
            "chandra_tcp_retransmits_total{{{labels},kind=\"{kind}\"}} {value}"
        )?;
    }
    for direction in ["encrypt", "decrypt"] {
        for what in ["cpu_seconds", "packets", "bytes"] {
            writeln!(
                page,
                "chandra_encryption_{what}_total{{{labels},protocol=\"wireguard\",direction=\"{direction}\"}} {value}"
            )?;
        }
    }
    if pod >= RANKS {
        return Ok(());
    }
    writeln!(
        page,
        "chandra_rdma_queue_pairs{{{labels},device=\"mlx5_0\",type=\"RC\",state=\"RTS\"}} 16"
    )?;
    for what in ["created", "destroyed"] {
        writeln!(
            page,
            "chandra_rdma_queue_pairs_{what}_total{{{labels}}} {value}"
        )?;
    }
    for bound in 0..28 {
        for what in [
            "gpu_runqueue_delay",
            "rdma_queue_pair_lifetime",
            "rdma_queue_pair_connect",
        ] {
            writeln!(
                page,
                "chandra_{what}_seconds_bucket{{{labels},le=\"{}\"}} {value}",
                1 << bound
            )?;
        }
        for operation in 0..8 {
            writeln!(
                page,
                "chandra_nccl_arrival_wait_seconds_bucket{{{labels},operation=\"{operation}\",source=\"host\",le=\"{bound}\"}} {value}"
            )?;
        }
    }
    for what in ["wait_seconds", "collectives", "last_arrivals"] {
        writeln!(
            page,
            "chandra_nccl_rank_{what}_total{{{labels},communicator=\"9c4f1e20a7d35b68\",rank=\"{pod}\",source=\"host\"}} {value}"
        )?;
    }
    Ok(())
}

/// Prints what part of a core the screen takes, at the interval that is the default. False without tmux.
pub(crate) fn per_screen() -> bool {
    note(&"chandra top");
    let Some(tmux) = Tmux::start(200, 50) else {
        return false;
    };
    let runtime = Runtime::new().expect("a runtime");
    let listener = runtime.block_on(bind("127.0.0.1:0")).expect("a port");
    let address = listener.local_addr().expect("an address");
    let site = Page(AtomicU64::new(0));
    let size = site.metrics().expect("a page").len();
    runtime.spawn(serve(
        listener,
        Arc::new(site),
        Arc::new(Web::default()),
        Limits::default(),
        std::future::pending(),
    ));
    tmux.run(&format!(
        "{} top --url http://{address}",
        build().join("chandra").display()
    ));
    tmux.until("the table", |screen| screen.contains("inference/vllm"));
    // The window of its rates is full.
    thread::sleep(Duration::from_secs(12));
    let pid = tmux.pid();
    let before = cpu(&pid);
    thread::sleep(WATCHED);
    let share = 100.0 * (cpu(&pid) - before).as_secs_f64() / WATCHED.as_secs_f64();
    println!("| chandra top | {PODS} pods | Aim |");
    println!("|---|--:|---|");
    println!(
        "| CPU, % of a core | {share:.2} | {} |",
        aim(share, 2.0, "< 2")
    );
    println!("| page, KiB | {:.0} | |\n", size as f64 / 1024.0);
    true
}
