// SPDX-License-Identifier: Apache-2.0
//! The page for people: what works, what does not, and why. Complete without JavaScript.

use std::fmt::Write;

use crate::{
    VERSION,
    hook::Reason,
    kernel::Host,
    pods::{Source, View},
    signals::{State, running::Running},
};

/// Pods that the page lists by name; a node rarely has more, and the page stays small where it does.
const PODS: usize = 300;

/// Where each signal's runbook is.
const DOCS: &str = concat!(env!("CARGO_PKG_REPOSITORY"), "/blob/main/docs");

const STYLE: &str = "
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;overflow-wrap:anywhere}
h1{margin:0 0 .25rem}h2{margin:1.5rem 0 .5rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .75rem .35rem 0;border-bottom:1px solid #8884}
td:first-child,th{white-space:nowrap}
.up{color:#1a7f37}.failed{color:#d1242f}.absent,.disabled{color:#6e7781}
.up,.failed,.absent,.disabled{font-weight:600;white-space:nowrap}
.trouble,.less,.good{border-left:.25rem solid #d1242f;padding:.25rem .75rem;margin:.5rem 0}
.less{border-color:#bf8700}.lost{color:#9a6700;font-weight:600}.good{border-color:#1a7f37}
code{font-size:.9em}summary{cursor:pointer}
@media (prefers-color-scheme:dark){.lost{color:#d29922}.up{color:#3fb950}.failed{color:#f85149}.absent,.disabled{color:#9198a1}}
@media (max-width:40rem){th{display:none}tr{display:block;border-bottom:1px solid #8884;padding:.35rem 0}td{display:inline-block;border:0;padding:.1rem .75rem .1rem 0}}
";

/// Renders the page.
///
/// Without `show_paths` what the API server answers is not told: it may name what only who reads the log may see.
pub fn landing(
    signals: &[Running],
    pods: &View<'_>,
    host: &Host,
    source: &Source,
    show_paths: bool,
) -> String {
    let mut page = String::new();
    let hidden = *source == Source::Kube && !show_paths;
    let trouble = pods.trouble().map(|trouble| match hidden {
        true => "the API server does not tell the pods: the log says why, and this page with --web.show-paths",
        false => trouble,
    });
    // Writing to a String cannot fail.
    let _ = write(&mut page, signals, pods, host, source, trouble);
    page
}

fn write(
    page: &mut String,
    signals: &[Running],
    pods: &View<'_>,
    host: &Host,
    source: &Source,
    trouble: Option<&str>,
) -> std::fmt::Result {
    write!(
        page,
        "<!DOCTYPE html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>Chandra</title><style>{STYLE}</style><h1>Chandra</h1>\
         <p>What Hubble leaves dark on node <b>{}</b>, per pod, for Prometheus: <a href=/metrics>/metrics</a>. \
         <a href={DOCS}/README.md>What the signals mean</a>.\
         <p>{VERSION} on Linux {}. <a href=/livez>Alive?</a> <a href=/readyz>Ready?</a>",
        Text(&host.name),
        Text(&host.release)
    )?;
    let troubles = host.cgroups.iter().map(String::as_str).chain(trouble);
    for trouble in troubles.chain(
        signals
            .iter()
            .filter_map(|running| running.trouble.as_deref()),
    ) {
        write!(page, "<p class=trouble>{}", Text(trouble))?;
    }
    write_summary(page, signals)?;
    page.push_str("<h2>Signals</h2><table><tr><th>Signal<th>State<th>Question<th>Lost events");
    let newest = signals.iter().filter_map(age).min();
    for running in signals {
        write_signal(page, running, newest)?;
    }
    page.push_str("</table><p>absent: this host has no such thing, and nothing is wrong. Lost events were seen and not counted, by reason.");
    if let Some(seconds) = newest {
        write!(
            page,
            " The signals were last read {seconds} s ago, for a scrape."
        )?;
    }
    page.push_str("<h2>Hooks</h2><table><tr><th>Signal<th>State<th>Hooks");
    for running in signals {
        write_hooks(page, running)?;
    }
    page.push_str("</table>");
    write_pods(page, pods, source)?;
    page.push_str("</html>\n");
    Ok(())
}

/// What does not work, what works with less, and what to do: before anything else.
fn write_summary(page: &mut String, signals: &[Running]) -> std::fmt::Result {
    let mut all_well = true;
    for running in signals {
        let name = running.entry.name;
        let hooks = &running.status.hooks;
        let missing: Vec<_> = hooks
            .iter()
            .filter(|hook| hook.reason != Reason::Attached)
            .collect();
        let detail = missing
            .iter()
            .map(|hook| hook.detail.as_str())
            .find(|detail| !detail.is_empty());
        let (class, what, why) = match running.state() {
            // A read that failed is told above.
            State::Failed if running.trouble.is_some() => {
                all_well = false;
                continue;
            }
            State::Failed => ("trouble", "does not work", detail.unwrap_or_default()),
            State::Up | State::Absent => match (running.status.notes.first(), missing.len()) {
                (Some(note), _) => ("less", "works with less", note.as_str()),
                (None, 0) => continue,
                (None, _) => ("less", "works with less", detail.unwrap_or_default()),
            },
            State::Disabled => continue,
        };
        all_well = false;
        write!(page, "<p class={class}><b>{name} {what}")?;
        if !missing.is_empty() {
            write!(
                page,
                " ({} of {} hooks missing)",
                missing.len(),
                hooks.len()
            )?;
        }
        write!(page, ".</b> {}", Text(why))?;
        if class == "trouble" {
            write!(
                page,
                " <a href={DOCS}/runbooks/exporter.md#chandrasignaldown>Runbook</a>"
            )?;
        }
    }
    if all_well {
        page.push_str("<p class=good>Everything that this host has works");
        let lost = signals.iter().flat_map(Running::lost);
        match lost.map(|(_, events)| events).sum::<u64>() {
            0 => page.push('.'),
            lost => write!(
                page,
                ". {lost} events were lost since the start: the table says of what."
            )?,
        }
    }
    Ok(())
}

/// Seconds since a signal was read.
fn age(running: &Running) -> Option<u64> {
    running.read_at.map(|at| at.elapsed().as_secs())
}

/// One signal; its age where others were read later.
fn write_signal(page: &mut String, running: &Running, newest: Option<u64>) -> std::fmt::Result {
    let lost: Vec<_> = running
        .lost()
        .filter(|(_, n)| *n > 0)
        .map(|(reason, n)| format!("{n} lost: {reason}"))
        .collect();
    let state = running.state().label();
    let (name, question) = (running.entry.name, running.entry.question);
    let (class, lost) = match lost.is_empty() {
        true => ("", "none lost".to_owned()),
        false => (" class=lost", lost.join(", ")),
    };
    write!(
        page,
        "<tr><td><a href={DOCS}/runbooks/{name}.md>{name}</a><td class={state}>{state}<td>{}<td{class}>{lost}",
        Text(question)
    )?;
    match age(running) {
        // A scrape reads one after the other.
        Some(age) if Some(age) > newest.map(|newest| newest + 1) => {
            write!(page, "<br>read {age} s ago")
        }
        _ => Ok(()),
    }
}

/// A signal's hooks by what came of them: those that are attached folded, the others with why.
fn write_hooks(page: &mut String, running: &Running) -> std::fmt::Result {
    let name = running.entry.name;
    if running.state() == State::Disabled {
        write!(
            page,
            "<tr><td>{name}<td class=disabled>disabled<td>switched off by --disable"
        )?;
    }
    let mut reasons: Vec<Reason> = Vec::new();
    for hook in &running.status.hooks {
        if !reasons.contains(&hook.reason) {
            reasons.push(hook.reason);
        }
    }
    for reason in reasons {
        let hooks = running.status.hooks.iter();
        let hooks: Vec<_> = hooks.filter(|hook| hook.reason == reason).collect();
        let attached = reason == Reason::Attached;
        let class = if attached { "up" } else { "failed" };
        write!(
            page,
            "<tr><td>{name}<td class={class}>{}<td>",
            reason.label()
        )?;
        // One reason may be that of every hook: it is told once.
        let mut details: Vec<&str> = hooks.iter().map(|hook| hook.detail.as_str()).collect();
        details.dedup();
        details.retain(|detail| !detail.is_empty());
        if let [one] = details[..] {
            write!(page, "{}<br>", Text(one))?;
        }
        let open = if attached || hooks.len() > 4 {
            ""
        } else {
            " open"
        };
        write!(
            page,
            "<details{open}><summary>{} hooks</summary>",
            hooks.len()
        )?;
        for hook in hooks {
            write!(
                page,
                "<div><code>{}</code> {}",
                hook.name,
                hook.method.label()
            )?;
            if details.len() > 1 && !hook.detail.is_empty() {
                write!(page, ": {}", Text(&hook.detail))?;
            }
            page.push_str("</div>");
        }
        page.push_str("</details>");
    }
    for found in &running.status.found {
        write!(page, "<tr><td>{name}<td>found<td>{}", Text(found))?;
    }
    for note in &running.status.notes {
        write!(page, "<tr><td>{name}<td>less<td>{}", Text(note))?;
    }
    Ok(())
}

fn write_pods(page: &mut String, pods: &View<'_>, source: &Source) -> std::fmt::Result {
    let listed = pods.listed();
    write!(page, "<h2>Pods</h2><p>Cgroups: {}. ", pods.cgroups())?;
    match source {
        Source::None => {
            page.push_str("Pod names are off (<code>--pods none</code>): series carry the cgroup's name as <code>container</code>.");
            return Ok(());
        }
        Source::Kube => write!(page, "Pods: {}, from the API server.", listed.len())?,
        Source::File(path) => write!(
            page,
            "Pods: {}, from <code>{}</code>.",
            listed.len(),
            Text(&path.to_string_lossy())
        )?,
    }
    match pods.age(std::time::Instant::now()) {
        Some(age) => write!(page, " It last answered {} s ago.", age.as_secs())?,
        None => page.push_str(" It has not answered yet."),
    }
    page.push_str("<table><tr><th>Namespace<th>Pod<th>Running");
    for (namespace, name, containers) in listed.iter().take(PODS) {
        write!(
            page,
            "<tr><td>{}<td>{}<td>{containers} {}",
            Text(namespace),
            Text(name),
            if *containers == 1 {
                "container"
            } else {
                "containers"
            }
        )?;
    }
    page.push_str("</table>");
    if listed.len() > PODS {
        write!(page, "<p>and {} more", listed.len() - PODS)?;
    }
    Ok(())
}

/// Text, escaped for HTML.
struct Text<'a>(&'a str);

impl std::fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '&' => f.write_str("&amp;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            c => f.write_char(c),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(
            Text("<a href='x'>&\"").to_string(),
            "&lt;a href=&#39;x&#39;&gt;&amp;&quot;"
        );
    }
}
