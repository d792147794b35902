// SPDX-License-Identifier: Apache-2.0
//! The node as plain text: `chandra top --once`.

use std::fmt::Write;

use unicode_width::UnicodeWidthStr;

use super::{
    columns::Column,
    format::{number, time, visible},
    node::{Node, Tunnel},
};

/// Everything that is shown at once. Lines of complaints begin with `WRONG`, those of pods follow the line that begins with `POD`.
pub fn table(node: &Node, source: &str) -> String {
    let mut text = format!("{}\n{}\n", title(node, source), signals(node));
    for tunnel in node.tunnels.iter().map(sessions) {
        let _ = writeln!(text, "{tunnel}");
    }
    if node.complaints.is_empty() {
        text.push_str("nothing is above the threshold of its alert\n");
    }
    for complaint in &node.complaints {
        let _ = writeln!(text, "WRONG {} ({})", complaint.text, complaint.alert);
    }
    text.push('\n');
    let rows: Vec<[String; Column::ALL.len()]> = node
        .pods
        .iter()
        .map(|row| Column::ALL.map(|column| column.cell(row)))
        .collect();
    let width = |at: usize, column: Column| {
        let cells = rows.iter().map(|row| row[at].width());
        cells.chain([column.heading().len()]).max().unwrap_or(0)
    };
    let widths: Vec<_> = Column::ALL
        .iter()
        .enumerate()
        .map(|(at, column)| width(at, *column))
        .collect();
    let headings = Column::ALL.map(|column| column.heading().to_owned());
    for row in [&headings].into_iter().chain(&rows) {
        let mut line = String::new();
        for (at, cell) in row.iter().enumerate() {
            let space = " ".repeat(widths[at].saturating_sub(cell.width()));
            // Names to the left, numbers to the right.
            line += &match at {
                0 => format!("{cell}{space}"),
                _ => format!("  {space}{cell}"),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// Which exporter, and over how long.
pub(super) fn title(node: &Node, source: &str) -> String {
    format!(
        "chandra {}, {}, over {}",
        visible(&node.version),
        visible(source),
        time(node.seconds)
    )
}

/// The state of each signal.
pub(super) fn signals(node: &Node) -> String {
    let signals = node.signals.iter();
    let states =
        signals.map(|(name, signal)| format!("{} {}", visible(name), visible(&signal.state)));
    format!("signals: {}", states.collect::<Vec<_>>().join(", "))
}

/// How often an interface, or IPsec, derives sessions.
pub(super) fn sessions(tunnel: &Tunnel) -> String {
    let name = [&*tunnel.protocol, &*tunnel.interface]
        .map(visible)
        .join(" ");
    match tunnel.peers.first() {
        Some(peer) => format!(
            "{}: at most {} sessions a minute with one peer ({})",
            name.trim_end(),
            number(peer.sessions_per_minute),
            visible(&peer.peer)
        ),
        None => format!("{}: no sessions", name.trim_end()),
    }
}
