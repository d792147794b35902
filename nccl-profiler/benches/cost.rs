// SPDX-License-Identifier: Apache-2.0
//! What a collective costs the process that runs it: nanoseconds in the plugin, from its start to its last channel's stop.
//!
//! The probed functions are those that are shipped, without a uprobe on them: a uprobe adds its own cost twice (started and
//! finished), whatever the number of channels.

#[path = "../tests/plugin/mod.rs"]
mod plugin;

use std::time::Instant;

use plugin::{GROUP, Plugin};

const ROUNDS: u32 = 15;
const COLLECTIVES: u64 = 20_000;

fn main() {
    let plugin = Plugin::new(plugin::open("cost"), 6);
    println!("channels  in flight  ns per collective (best and median of {ROUNDS} rounds)");
    for in_flight in [1, 1000] {
        for channels in [1, 4, 24, 64] {
            let mut rounds: Vec<_> = (0..ROUNDS)
                .map(|_| round(plugin, channels, in_flight))
                .collect();
            rounds.sort_by(f64::total_cmp);
            println!(
                "{channels:8}  {in_flight:9}  {:.0} {:.0}",
                rounds[0],
                rounds[rounds.len() / 2]
            );
        }
    }
}

/// NCCL's order: all starts of a collective's channels, then all stops; here of several collectives.
fn round(plugin: Plugin, channels: u8, in_flight: usize) -> f64 {
    let (context, _) = plugin.init(1, 8, 3);
    let mut open = Vec::with_capacity(in_flight * usize::from(channels));
    let begin = Instant::now();
    for sequence in 0..COLLECTIVES {
        let group = plugin.start_kind(context, GROUP);
        let collective = plugin.collective(context, c"AllReduce", sequence, channels);
        plugin.stop(group);
        for channel in 0..channels {
            open.push(plugin.channel(context, collective, channel, 1_000_000 + sequence));
        }
        if open.len() >= in_flight * usize::from(channels) {
            for channel in open.drain(..) {
                plugin.channel_stop(channel, 2_000_000 + sequence);
            }
        }
    }
    let spent = begin.elapsed().as_nanos() as f64 / COLLECTIVES as f64;
    open.drain(..)
        .for_each(|channel| plugin.channel_stop(channel, 3_000_000));
    plugin.finalize(context);
    spent
}
