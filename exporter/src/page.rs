// SPDX-License-Identifier: Apache-2.0
//! The page for people: what works, what does not, and why. Complete without JavaScript.

use std::fmt::Write;

use crate::{
    pods::{Source, View},
    probe::Reason,
    scrape::{Running, VERSION},
    signals::State,
};

/// Pods that the page lists by name; a node rarely has more, and the page stays small where it does.
const PODS: usize = 300;

/// What the page says of the host.
#[derive(Clone, Debug)]
pub struct Host {
    /// As `uname -r` says.
    pub release: String,
    /// What is wrong with the cgroup hierarchy.
    pub cgroups: Option<String>,
}

const STYLE: &str = "
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem}
h1{margin:0 0 .25rem}h2{margin:1.5rem 0 .5rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .75rem .35rem 0;border-bottom:1px solid #8884}
.up{color:#1a7f37}.failed{color:#d1242f}.absent,.disabled{color:#6e7781}
.up,.failed,.absent,.disabled{font-weight:600}
.trouble{border-left:.25rem solid #d1242f;padding:.25rem .75rem;margin:.5rem 0}
code{font-size:.95em}
@media (prefers-color-scheme:dark){.up{color:#3fb950}.failed{color:#f85149}.absent,.disabled{color:#9198a1}}
";

/// Renders the page.
pub fn landing(signals: &[Running], pods: &View<'_>, host: &Host, source: &Source) -> String {
    let mut page = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut page, signals, pods, host, source);
    page
}

fn write(
    page: &mut String,
    signals: &[Running],
    pods: &View<'_>,
    host: &Host,
    source: &Source,
) -> std::fmt::Result {
    write!(
        page,
        "<!DOCTYPE html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>Chandra</title><style>{STYLE}</style><h1>Chandra</h1>\
         <p>{VERSION} on Linux {}. <a href=/metrics>Metrics</a> · <a href=/livez>alive</a> · <a href=/readyz>ready</a>",
        Text(&host.release)
    )?;
    let troubles = host
        .cgroups
        .iter()
        .map(String::as_str)
        .chain(pods.trouble());
    for trouble in troubles.chain(
        signals
            .iter()
            .filter_map(|running| running.trouble.as_deref()),
    ) {
        write!(page, "<p class=trouble>{}", Text(trouble))?;
    }
    page.push_str(
        "<h2>Signals</h2><div class=wide><table><tr><th>Signal<th>State<th>Question<th>Lost events",
    );
    for running in signals {
        let lost: Vec<_> = running
            .lost()
            .iter()
            .filter(|(_, n)| *n > 0)
            .map(|(reason, n)| format!("{n} {reason}"))
            .collect();
        let state = running.state().label();
        let (name, question) = (running.entry.name, running.entry.question);
        let lost = if lost.is_empty() {
            "none".to_owned()
        } else {
            lost.join(", ")
        };
        write!(
            page,
            "<tr><td>{name}<td class={state}>{state}<td>{}<td>{lost}",
            Text(question)
        )?;
    }
    page.push_str("</table></div><h2>Hooks</h2><div class=wide><table><tr><th>Signal<th>Hook<th>Method<th>State");
    for running in signals {
        let name = running.entry.name;
        if running.state() == State::Disabled {
            write!(
                page,
                "<tr><td>{name}<td colspan=3>switched off by --disable"
            )?;
        }
        for hook in &running.attempt.hooks {
            let class = if hook.reason == Reason::Attached {
                "up"
            } else {
                "failed"
            };
            let (method, reason) = (hook.method.label(), hook.reason.label());
            write!(
                page,
                "<tr><td>{name}<td><code>{}</code><td>{method}<td><span class={class}>{reason}</span>",
                hook.name
            )?;
            if !hook.detail.is_empty() {
                write!(page, "<br>{}", Text(&hook.detail))?;
            }
        }
        for found in &running.attempt.found {
            write!(page, "<tr><td>{name}<td colspan=3>{}", Text(found))?;
        }
        for note in &running.attempt.notes {
            write!(
                page,
                "<tr><td>{name}<td colspan=3>works with less: {}",
                Text(note)
            )?;
        }
    }
    page.push_str("</table></div>");
    write_pods(page, pods, source)?;
    page.push_str("</html>\n");
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
    page.push_str("<div class=wide><table><tr><th>Namespace<th>Pod<th>Containers");
    for (namespace, name, containers) in listed.iter().take(PODS) {
        write!(
            page,
            "<tr><td>{}<td>{}<td>{containers}",
            Text(namespace),
            Text(name)
        )?;
    }
    page.push_str("</table></div>");
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
