// SPDX-License-Identifier: Apache-2.0
//! How does the node look in a terminal, from 80 × 24 to any other?

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::Paragraph,
};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::{
    columns::Column,
    detail::Detail,
    format::{number, visible},
    node::{Node, Row},
    state::Screen,
    table,
};

const BAD: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);
const FAINT: Style = Style::new().add_modifier(Modifier::DIM);
const HEADING: Style = Style::new().add_modifier(Modifier::REVERSED);
const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);

/// Columns for names, where there are more than they need.
const NAMES: usize = 25;

/// Draws everything. A terminal without room shows what fits, and of nothing nothing.
pub(super) fn draw(frame: &mut Frame<'_>, screen: &mut Screen) {
    let area = frame.area();
    let head = head(screen, area);
    let heights = [
        Constraint::Length(head.len().try_into().unwrap_or(u16::MAX)),
        Constraint::Min(0),
        Constraint::Length(1),
    ];
    let [above, middle, below] = Layout::vertical(heights).areas(area);
    frame.render_widget(Paragraph::new(head), above);
    let body = match (screen.help, screen.detail) {
        (true, _) => scrolled(screen, help(), middle),
        (false, Some(detail)) => of_detail(screen, detail, middle),
        (false, None) => of_table(screen, middle),
    };
    frame.render_widget(Paragraph::new(body), middle);
    frame.render_widget(Paragraph::new(foot(screen)), below);
}

/// Which exporter, the signals, and what is wrong.
fn head(screen: &Screen, area: Rect) -> Vec<Line<'static>> {
    let width = usize::from(area.width);
    let mut lines = Vec::new();
    match &screen.node {
        Some(node) => {
            lines.push(Line::raw(cut(&table::title(node, &screen.source), width)));
            lines.push(signals(node));
        }
        None => lines.push(Line::raw(cut(
            &format!(
                "chandra top, {}: waiting for two pages",
                visible(&screen.source)
            ),
            width,
        ))),
    }
    let trouble = match (&screen.silence, screen.stale()) {
        (Some((why, since)), _) => Some(format!(
            "NO ANSWER for {} s: {why}",
            since.elapsed().as_secs()
        )),
        (None, Some(age)) => Some(format!(
            "NO ANSWER yet: all of this is {} s old",
            age.as_secs()
        )),
        (None, None) => None,
    };
    if let Some(text) = trouble {
        lines.push(Line::styled(cut(&visible(&text), width), BAD));
    }
    if let Some(node) = screen.node.as_ref().filter(|_| !screen.help) {
        // A quarter of the screen, a sentence over as many lines as it takes.
        let most = (usize::from(area.height) / 4).clamp(1, 8);
        let wrong = wrong(node, width, most);
        lines.extend(wrong);
    }
    lines
}

fn signals(node: &Node) -> Line<'static> {
    let mut spans = Vec::new();
    for (name, signal) in &node.signals {
        let style = match &*signal.state {
            "up" => Style::new().fg(Color::Green),
            "failed" => BAD,
            _ => FAINT,
        };
        spans.push(Span::raw(format!("{} ", visible(name))));
        spans.push(Span::styled(visible(&signal.state), style));
        spans.push(Span::raw("  "));
    }
    for tunnel in &node.tunnels {
        let Some(peer) = tunnel.peers.first() else {
            continue;
        };
        let name = if tunnel.interface.is_empty() {
            &tunnel.protocol
        } else {
            &tunnel.interface
        };
        let text = format!(
            "{} {} sessions/min  ",
            visible(name),
            number(peer.sessions_per_minute)
        );
        spans.push(Span::raw(text));
    }
    Line::from(spans)
}

fn wrong(node: &Node, width: usize, most: usize) -> Vec<Line<'static>> {
    if node.complaints.is_empty() {
        let good = Style::new().fg(Color::Green);
        return vec![Line::styled(
            "Nothing is above the threshold of its alert.",
            good,
        )];
    }
    let mut lines: Vec<Line<'_>> = Vec::new();
    for (at, complaint) in node.complaints.iter().enumerate() {
        let text = format!("{} ({})", complaint.text, complaint.alert);
        let parts = wrapped(&text, width);
        let left = node.complaints.len() - at;
        // Room for this one, and for how many more there are.
        let needed = lines.len() + parts.len() + usize::from(left > 1);
        if at > 0 && needed > most {
            lines.push(Line::styled(format!("and {left} more"), BAD));
            break;
        }
        lines.extend(parts.into_iter().map(|part| Line::styled(part, BAD)));
    }
    lines
}

/// The table, from the row on at which the selected one is in sight.
fn of_table(screen: &mut Screen, area: Rect) -> Vec<Line<'static>> {
    let room = usize::from(area.height).saturating_sub(1);
    screen.room = room.max(1);
    let rows = screen.rows();
    let at = screen.position(&rows);
    let first = screen
        .offset
        .clamp(
            (at + 1).saturating_sub(room),
            at.max((at + 1).saturating_sub(room)),
        )
        .min(rows.len().saturating_sub(room));
    let longest = rows.iter().map(|row| Column::Pod.cell(row).width()).max();
    let names = usize::from(area.width).saturating_sub(numbers_width());
    // On a wide screen the numbers stay near the names.
    let names = names
        .min(longest.unwrap_or(0).max(NAMES))
        .max(Column::Pod.width());
    let mut lines = vec![heading(screen.sort, names)];
    for (index, row) in rows.iter().enumerate().skip(first).take(room) {
        lines.push(of_row(row, names, index == at));
    }
    if rows.is_empty() {
        let why = match screen.filter.is_empty() {
            true => "No pod and no cgroup has had an event that a signal counts.",
            false => "No name contains the filter.",
        };
        lines.push(Line::raw(why));
    }
    screen.offset = first;
    lines
}

/// What the columns behind the names take.
fn numbers_width() -> usize {
    let numbers = Column::ALL.iter().skip(1);
    numbers.map(|column| column.width() + 1).sum()
}

fn heading(sort: Column, names: usize) -> Line<'static> {
    let span = |column: Column| {
        let text = match column {
            Column::Pod => left(column.heading(), names),
            _ => format!(" {}", right(column.heading(), column.width())),
        };
        match column == sort {
            true => Span::styled(
                text,
                HEADING.add_modifier(Modifier::BOLD | Modifier::UNDERLINED),
            ),
            false => Span::styled(text, HEADING),
        }
    };
    Line::from(Column::ALL.map(span).to_vec())
}

fn of_row(row: &Row, names: usize, is_chosen: bool) -> Line<'static> {
    let span = |column: Column| {
        let cell = column.cell(row);
        let text = match column {
            Column::Pod => left(&middle_cut(&cell, names), names),
            _ => format!(" {}", right(&cell, column.width())),
        };
        let style = if column.is_bad(row) {
            BAD
        } else if cell == "-" || cell == "0" {
            FAINT
        } else {
            Style::new()
        };
        Span::styled(text, style)
    };
    let line = Line::from(Column::ALL.map(span).to_vec());
    match is_chosen {
        true => line.patch_style(CHOSEN),
        false => line,
    }
}

fn of_detail(screen: &mut Screen, detail: Detail, area: Rect) -> Vec<Line<'static>> {
    let rows = screen.rows();
    let selected = screen.selected.as_ref();
    let row = rows.iter().find(|row| Some(&row.owner) == selected);
    let lines = match (row, &screen.node) {
        (Some(row), Some(node)) => {
            let title = format!("{} of {}", detail.name(), visible(&row.owner.name()));
            let lines = detail.lines(row, node).into_iter();
            [title, String::new()].into_iter().chain(lines).collect()
        }
        _ => vec!["It is gone.".to_owned()],
    };
    scrolled(screen, lines, area)
}

/// Lines from the offset on, which goes no further than the last one.
fn scrolled(screen: &mut Screen, lines: Vec<String>, area: Rect) -> Vec<Line<'static>> {
    let room = usize::from(area.height);
    let width = usize::from(area.width);
    screen.room = room.max(1);
    let lines: Vec<_> = lines.iter().flat_map(|line| wrapped(line, width)).collect();
    screen.offset = screen.offset.min(lines.len().saturating_sub(room));
    let shown = lines.into_iter().skip(screen.offset).take(room);
    shown.map(Line::raw).collect()
}

fn help() -> Vec<String> {
    let mut lines: Vec<_> = Column::ALL
        .iter()
        .map(|column| format!("{:<8} {}", column.heading(), column.meaning()))
        .collect();
    lines.push(String::new());
    lines.extend(
        [
            "up down   choose a pod; page up, page down, home and end too",
            "< >       sort by another column, the largest first",
            "/         show only names that contain something; Esc ends it",
            "t r g n e what tcp, rdma, gpu, nccl and encryption say of the chosen pod",
            "Enter     the same, of the signal by which it hurts most",
            "space     hold still, go on",
            "q         quit",
            "",
            "Red is above the threshold of the alert, which also waits for some minutes.",
        ]
        .map(str::to_owned),
    );
    lines
}

fn foot(screen: &Screen) -> Line<'static> {
    if screen.is_filtering {
        return Line::raw(format!("names that contain: {}_", visible(&screen.filter)));
    }
    let mut text = match (screen.help, screen.detail.is_some()) {
        (false, false) => "t r g n e detail  < > sort  / filter  space pause  ? help  q quit",
        _ => "Esc back  up down scroll  t r g n e another signal  q quit",
    }
    .to_owned();
    if screen.is_paused {
        text = format!("PAUSED  {text}");
    }
    if !screen.filter.is_empty() {
        text = format!("filter {:?}  {text}", visible(&screen.filter));
    }
    Line::styled(text, FAINT)
}

/// As many characters as fit.
fn cut(text: &str, width: usize) -> String {
    let mut taken = 0;
    let fits = |c: &char| {
        taken += c.width().unwrap_or(0);
        taken <= width
    };
    text.chars().take_while(fits).collect()
}

/// Both ends of a name: what tells pods apart is mostly at the end.
fn middle_cut(name: &str, width: usize) -> String {
    if name.width() <= width {
        return name.to_owned();
    }
    let begin = cut(name, width.saturating_sub(1) / 2);
    let backwards: String = name.chars().rev().collect();
    let end = cut(&backwards, width.saturating_sub(1 + begin.width()));
    let end: String = end.chars().rev().collect();
    format!("{begin}…{end}")
}

fn left(text: &str, width: usize) -> String {
    let text = cut(text, width);
    let space = " ".repeat(width.saturating_sub(text.width()));
    text + &space
}

/// A number; what does not fit ends with a mark, or it would be another number.
fn right(text: &str, width: usize) -> String {
    let text = match text.width() > width {
        true => cut(text, width.saturating_sub(1)) + "…",
        false => text.to_owned(),
    };
    " ".repeat(width.saturating_sub(text.width())) + &text
}

/// A sentence over lines, broken between words where there are any.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = text;
    while rest.width() > width && width > 0 {
        let line = cut(rest, width);
        let at = match rest[line.len()..].starts_with(' ') {
            true => line.len(),
            // A character that is wider than the line goes alone.
            false => match line.rfind(' ').filter(|at| *at > 0) {
                Some(at) => at,
                None if line.is_empty() => rest.chars().next().map_or(0, char::len_utf8),
                None => line.len(),
            },
        };
        lines.push(rest[..at].to_owned());
        rest = rest[at..].trim_start_matches(' ');
    }
    lines.push(rest.to_owned());
    lines
}
