// SPDX-License-Identifier: Apache-2.0
//! `chandra-mixin`: what an operator imports, rendered from jsonnet, and brought into values files that exist already.
#![forbid(unsafe_code)]

use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use chandra_mixin::{
    Failure, keys,
    lint::{self, Finding, Severity},
    merge,
    ours::Chart,
    render,
    wanted::set_release,
    write,
    yaml::Problem,
};
use clap::{Parser, Subcommand};
use serde_json::Value;
use similar::TextDiff;

/// The user's mistake: a flag, a file or a place to write to.
const USAGE: u8 = 2;

/// Renders Chandra's dashboards, Prometheus rules and Helm values; merges and checks values files
#[derive(Parser)]
#[command(version, about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write alerts/, dashboards/, helm-values/ and manifests/, and remove what is not rendered any more
    Render {
        /// Jsonnet that is added to the mixin: `{ _config+:: { window: '1m' } }`
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The folder to write into
        #[arg(long, value_name = "DIR", default_value = ".")]
        out: PathBuf,
        /// Write nothing; exit with 1 if a file is not what would be written
        #[arg(long)]
        check: bool,
    },
    /// Add Chandra's Helm values to a values file of yours; nothing of yours is lost, and what stays against ours is said
    ///
    /// Of several files the last is added to: the others stay as they are, and Helm gets them first as before.
    Merge {
        #[command(flatten)]
        values: Values,
        /// The chart that it is for: cilium, kube-prometheus-stack or prometheus
        #[arg(long, value_name = "NAME", default_value = "cilium")]
        chart: String,
        /// The chart's version; the newest that is known here if there is none
        #[arg(long, value_name = "VERSION")]
        version: Option<String>,
        /// Add the exporter as a container of the Cilium agent's pod too
        #[arg(long)]
        sidecar: bool,
        /// The name of your Prometheus Operator's Helm release, by which it selects monitors
        #[arg(long, value_name = "NAME")]
        release: Option<String>,
        /// Jsonnet that is added to the mixin, as for render
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The file to write; stdout if there is none
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Print what would change instead, as a patch; write nothing
        #[arg(long, conflicts_with = "out")]
        diff: bool,
    },
    /// Say what Helm accepts in values files without a word; exit with 1 if there is something to say
    Lint {
        #[command(flatten)]
        values: Values,
        /// The chart that they are for
        #[arg(long, value_name = "NAME", default_value = "cilium")]
        chart: String,
        /// The chart's version; the newest that is known here if there is none
        #[arg(long, value_name = "VERSION")]
        version: Option<String>,
        /// The chart's folder, or its values.yaml, instead of the keys that are known here
        #[arg(long, value_name = "PATH")]
        chart_dir: Option<PathBuf>,
        /// The name of your Prometheus Operator's Helm release, by which it selects monitors
        #[arg(long, value_name = "NAME")]
        release: Option<String>,
        /// Leave out what is less than this
        #[arg(long, value_name = "SEVERITY", default_value = "info")]
        severity: Severity,
        /// Print findings as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the keys of a chart, as lint has them for the versions that it knows
    Keys {
        /// A chart's folder, or its values.yaml
        chart: PathBuf,
    },
}

/// The user's values files
#[derive(clap::Args)]
struct Values {
    /// Your values files in the order in which Helm gets them; `-` is stdin
    #[arg(
        value_name = "VALUES",
        required_unless_present = "files",
        conflicts_with = "files"
    )]
    values: Vec<PathBuf>,
    /// The same, as Helm has it
    #[arg(short = 'f', long = "values", value_name = "FILE", id = "files")]
    files: Vec<PathBuf>,
}

impl Values {
    fn read(&self) -> Result<Vec<(PathBuf, String)>, Failure> {
        let paths = self.values.iter().chain(&self.files);
        paths.map(|path| read(path)).collect()
    }
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Render { config, out, check } => rendered(config.as_deref(), &out, check),
        Command::Merge {
            values,
            chart,
            version,
            sidecar,
            release,
            config,
            out,
            diff,
        } => Chart::find(&chart, version.as_deref()).and_then(|chart| {
            let mut ours = chart.values(config.as_deref(), sidecar)?;
            if let Some(release) = release {
                set_release(&mut ours, &release);
            }
            merged(&values, &chart, &ours, out.as_deref(), diff)
        }),
        Command::Lint {
            values,
            chart,
            version,
            chart_dir,
            release,
            severity,
            json,
        } => judged(
            &values,
            &chart,
            version.as_deref(),
            chart_dir.as_deref(),
            release.as_deref(),
        )
        .and_then(|mut found| {
            found.retain(|finding| finding.severity <= severity);
            said(&found, json)
        }),
        Command::Keys { chart } => keys::list(&chart).and_then(|list| print(&list)),
    };
    match done {
        Ok(code) => code,
        Err(failure) => {
            complain(&failure.to_string());
            match failure {
                Failure::Yaml(_) => ExitCode::FAILURE,
                _ => ExitCode::from(USAGE),
            }
        }
    }
}

fn rendered(config: Option<&Path>, out: &Path, check: bool) -> Result<ExitCode, Failure> {
    let files = render::files(config)?;
    if !check {
        write::write(out, &files)?;
        return Ok(ExitCode::SUCCESS);
    }
    let different = write::differences(out, &files)?;
    for path in &different {
        complain(&format!("{path} is not what the mixin renders"));
    }
    match different.is_empty() {
        true => Ok(ExitCode::SUCCESS),
        false => Ok(ExitCode::FAILURE),
    }
}

fn merged(
    values: &Values,
    chart: &Chart,
    ours: &Value,
    out: Option<&Path>,
    diff: bool,
) -> Result<ExitCode, Failure> {
    let files = values.read()?;
    let merged = merge::merge(&files, ours, chart.defaults().as_ref())?;
    match (out, files.last()) {
        (Some(out), Some((name, _))) => write::file(out, &merged.text, name)?,
        (None, Some((name, text))) if diff => {
            let name = name.display().to_string();
            let diff = TextDiff::from_lines(text.as_str(), merged.text.as_str());
            print(&diff.unified_diff().header(&name, &name).to_string())?;
        }
        _ => {
            print(&merged.text)?;
        }
    }
    for note in &merged.notes {
        say(&format!(
            "{}:{}: {}: {}",
            files[note.file].0.display(),
            note.line,
            note.path,
            note.text
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn judged(
    values: &Values,
    chart: &str,
    version: Option<&str>,
    chart_dir: Option<&Path>,
    release: Option<&str>,
) -> Result<Vec<Finding>, Failure> {
    let cilium = chart == "cilium";
    let spec = match chart_dir {
        Some(path) => keys::of_chart(path)?,
        None => {
            let chart = Chart::find(chart, version)?;
            chart.keys.ok_or_else(|| {
                Failure::Unknown(format!(
                    "the keys of {} are not known here: name its folder with --chart-dir",
                    chart.name
                ))
            })?
        }
    };
    let ours = match cilium {
        true => Chart::find(chart, None)?.values(None, false)?,
        false => Value::Null,
    };
    let files = values.read()?;
    let rules = lint::Rules {
        keys: &spec,
        cilium,
        ours: &ours,
        release,
    };
    lint::lint(&files, rules)
}

fn said(found: &[Finding], json: bool) -> Result<ExitCode, Failure> {
    let text = match json {
        true => {
            let list: Vec<Value> = found.iter().map(Finding::json).collect();
            format!("{:#}\n", Value::Array(list))
        }
        false => found.iter().map(|finding| format!("{finding}\n")).collect(),
    };
    print(&text)?;
    match found.is_empty() {
        true => Ok(ExitCode::SUCCESS),
        false => Ok(ExitCode::FAILURE),
    }
}

/// A values file, or stdin, with the name that messages call it by.
fn read(path: &Path) -> Result<(PathBuf, String), Failure> {
    let (name, bytes) = match path.as_os_str() == "-" {
        false => (path.to_owned(), fs::read(path)),
        true => {
            let mut bytes = Vec::new();
            let read = io::stdin().read_to_end(&mut bytes);
            (PathBuf::from("stdin"), read.map(|_| bytes))
        }
    };
    let bytes = bytes.map_err(|error| Failure::reading(&name, error))?;
    String::from_utf8(bytes)
        .map_err(|error| {
            let whole = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = whole.iter().filter(|byte| **byte == b'\n').count() + 1;
            let problem = Problem {
                line,
                column: 1,
                message: "is not UTF-8, which Helm wants".to_owned(),
            };
            Failure::values(&name, problem)
        })
        .map(|text| (name.clone(), text))
}

fn print(text: &str) -> Result<ExitCode, Failure> {
    let mut stdout = io::stdout().lock();
    let done = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    done.map_err(|error| Failure::Io {
        action: "write to",
        path: "stdout".to_owned(),
        source: error,
    })?;
    Ok(ExitCode::SUCCESS)
}

fn say(message: &str) {
    let _ = writeln!(io::stderr(), "{message}");
}

fn complain(message: &str) {
    say(&format!("chandra-mixin: {message}"));
}
