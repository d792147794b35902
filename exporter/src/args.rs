// SPDX-License-Identifier: Apache-2.0
//! The command line. Every flag has an environment variable.

use std::{path::PathBuf, time::Duration};

use clap::{Args as ClapArgs, Parser, Subcommand};

use crate::{
    capabilities::{CUDA_CALLS, GPU_DEVICE},
    pods::Source,
    signals::nccl::salt::Salt,
    top::{self, source::Login},
};

/// Sees what Hubble leaves dark for AI workloads, and serves it to Prometheus.
#[derive(Debug, Parser)]
#[command(name = "chandra", version, args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to serve.
    #[command(flatten)]
    pub serve: Serve,
}

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell what will work on this host, and why not. Exits with 1 if something that should work does not.
    Check {
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
        /// Where cgroup v2 is mounted, if not where this process sees it.
        #[arg(
            long = "path.cgroupfs",
            value_name = "DIR",
            env = "CHANDRA_PATH_CGROUPFS"
        )]
        cgroupfs: Option<PathBuf>,
        /// The secret that names of NCCL's communicators are made with, if the exporter has one.
        #[arg(
            long = "nccl.salt-file",
            value_name = "FILE",
            env = "CHANDRA_NCCL_SALT_FILE",
            value_parser = Salt::read
        )]
        nccl_salt: Option<Salt>,
        /// A file with this node's pods as `kubectl get pods -o json` prints them: are their containers where cgroups are looked for?
        #[arg(long, value_name = "FILE")]
        pods: Option<PathBuf>,
    },
    /// Put the NCCL profiler plugin into a folder from where jobs load it, as libnccl-profiler.so.
    InstallNcclProfiler {
        /// The folder; it has to be there.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// The plugin. The image has it there.
        #[arg(long, value_name = "FILE", default_value = "/libnccl-profiler.so")]
        from: PathBuf,
        /// Stay, and put it back once a minute if somebody has taken or changed it.
        #[arg(long)]
        keep: bool,
    },
    /// Print the reference of all metrics, in Markdown.
    Metrics,
    /// Show in a terminal which pods of this node hurt, and by what.
    Top(Box<Top>),
    /// Look into files for an exporter that asks over standard input. It starts this itself.
    #[command(hide = true)]
    Look,
}

/// What to show in a terminal.
#[derive(Clone, Debug, ClapArgs)]
pub struct Top {
    /// The exporter, as http://HOST:PORT or https://HOST:PORT; without this the one of this host, and where none runs, the signals are attached
    /// by top itself, which takes the capabilities of the exporter.
    #[arg(long, value_name = "URL", env = "CHANDRA_URL")]
    pub url: Option<String>,
    /// Print a table once and end; without a terminal that is always so.
    #[arg(long)]
    pub once: bool,
    /// Print JSON once and end.
    #[arg(long)]
    pub json: bool,
    /// Between two looks.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = duration)]
    pub interval: Duration,
    /// A user that the exporter asks for.
    #[arg(long, value_name = "NAME", env = "CHANDRA_USER")]
    pub user: Option<String>,
    /// A file with the user's password.
    #[arg(long, value_name = "FILE", env = "CHANDRA_PASSWORD_FILE")]
    pub password_file: Option<PathBuf>,
    /// Certificates in PEM, one of which signed that of an exporter with TLS.
    #[arg(long, value_name = "FILE", env = "CHANDRA_CA_FILE")]
    pub ca_file: Option<PathBuf>,
    /// How the signals are attached where no exporter runs.
    #[command(flatten, next_help_heading = "Where no exporter runs")]
    pub serve: Serve,
}

impl Top {
    /// The exporter's address: what was asked for, or that of an exporter of this host with the same settings.
    pub fn url(&self) -> String {
        let listen = &self.serve.listen;
        // What listens on every address listens on this one.
        let here = ["", "0.0.0.0", "[::]"]
            .iter()
            .find_map(|every| listen.strip_prefix(every)?.strip_prefix(':'));
        match (&self.url, here) {
            (Some(url), _) => url.clone(),
            (None, Some(port)) => format!("http://127.0.0.1:{port}"),
            (None, None) => format!("http://{listen}"),
        }
    }

    /// Who asks.
    pub fn login(&self) -> Login {
        Login {
            user: self.user.clone(),
            password: self.password_file.clone(),
            ca: self.ca_file.clone(),
        }
    }

    /// Whether it is shown once and not on a screen.
    pub fn is_once(&self) -> bool {
        self.once || self.json || !top::has_terminal()
    }
}

/// How to serve.
#[derive(Clone, Debug, ClapArgs)]
pub struct Serve {
    /// Address to serve on; without a host, all of them.
    #[arg(
        long = "web.listen-address",
        value_name = "ADDRESS",
        env = "CHANDRA_WEB_LISTEN_ADDRESS",
        default_value = ":9970"
    )]
    pub listen: String,
    /// TLS, client certificates, users and headers: a file in the format of Prometheus' exporter-toolkit.
    #[arg(
        long = "web.config.file",
        value_name = "FILE",
        env = "CHANDRA_WEB_CONFIG_FILE"
    )]
    pub web_config: Option<PathBuf>,
    /// Show paths and build ids of containers' libraries, and what the API server answers in error, on the page for people. They are always
    /// in the log.
    #[arg(
        long = "web.show-paths",
        env = "CHANDRA_WEB_SHOW_PATHS",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    pub show_paths: bool,
    /// Where pod names come from: `kube` (default inside a cluster), a file with a PodList in JSON, or `none`.
    #[arg(long, value_name = "kube|FILE|none", env = "CHANDRA_PODS")]
    pub pods: Option<Source>,
    /// The node whose pods are watched (set it from spec.nodeName).
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub node_name: Option<String>,
    /// Signals to leave off; may be given several times.
    #[arg(long, value_name = "SIGNAL", env = "CHANDRA_DISABLE", value_delimiter = ',', value_parser = signal)]
    pub disable: Vec<String>,
    /// Where cgroup v2 is mounted, if not where this process sees it.
    #[arg(
        long = "path.cgroupfs",
        value_name = "DIR",
        env = "CHANDRA_PATH_CGROUPFS"
    )]
    pub cgroupfs: Option<PathBuf>,
    /// How long the totals of a container that is gone stay.
    #[arg(long, value_name = "DURATION", env = "CHANDRA_RETENTION", default_value = "5m", value_parser = duration)]
    pub retention: Duration,
    /// Containers that a signal shows by name; the rest goes to pod="other".
    #[arg(
        long,
        value_name = "N",
        env = "CHANDRA_MAX_OWNERS",
        default_value_t = 1200
    )]
    pub max_owners: usize,
    /// How long the counts of an owner that has its first RDMA event are shown at 0, so that rate() sees what it began with; 0s shows them at
    /// once.
    #[arg(
        long = "rdma.zero-for",
        value_name = "DURATION",
        env = "CHANDRA_RDMA_ZERO_FOR",
        default_value = "60s",
        value_parser = duration_or_none
    )]
    pub rdma_zero_for: Duration,
    /// Of how many encrypted packets one is timed.
    #[arg(
        long = "encryption.timed-every",
        value_name = "N",
        env = "CHANDRA_ENCRYPTION_TIMED_EVERY",
        default_value_t = 32,
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub timed_every: u32,
    /// UDP port of VXLAN inside the encryption, which is looked through to the pods' addresses.
    #[arg(
        long = "encryption.vxlan-port",
        value_name = "PORT",
        env = "CHANDRA_ENCRYPTION_VXLAN_PORT",
        default_value_t = 8472
    )]
    pub vxlan_port: u16,
    /// UDP port of Geneve inside the encryption, likewise.
    #[arg(
        long = "encryption.geneve-port",
        value_name = "PORT",
        env = "CHANDRA_ENCRYPTION_GENEVE_PORT",
        default_value_t = 6081
    )]
    pub geneve_port: u16,
    /// A device file by which a GPU is driven, besides those of NVIDIA, AMD and the kernel's own drivers. May be repeated.
    #[arg(
        long = "gpu.device",
        value_name = "FILE",
        env = "CHANDRA_GPU_DEVICES",
        value_delimiter = ',',
        value_parser = device_file
    )]
    pub gpu_devices: Vec<PathBuf>,
    /// Time calls of the CUDA driver, in a sample of the time.
    #[arg(
        long = "cuda-calls",
        env = "CHANDRA_CUDA_CALLS",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    pub cuda_calls: bool,
    /// The share of the time in which they are timed: above 0, at most 1. A call then takes about a microsecond longer.
    #[arg(
        long = "cuda-calls.budget",
        value_name = "SHARE",
        env = "CHANDRA_CUDA_CALLS_BUDGET",
        default_value = "0.033",
        value_parser = share
    )]
    pub cuda_budget: f64,
    /// A secret that all nodes of the cluster share: pages then name NCCL's communicators by a keyed hash, so that nobody who reads them can
    /// pretend to be a rank of another job.
    #[arg(
        long = "nccl.salt-file",
        value_name = "FILE",
        env = "CHANDRA_NCCL_SALT_FILE",
        value_parser = Salt::read
    )]
    pub nccl_salt: Option<Salt>,
    /// What to log: error, warn, info, debug or trace, also by module.
    #[arg(
        long = "log.level",
        value_name = "LEVEL",
        env = "CHANDRA_LOG_LEVEL",
        default_value = "info"
    )]
    pub log: tracing_subscriber::filter::Targets,
}

impl Serve {
    /// The flags that are given of those that take more capabilities.
    pub fn flags(&self) -> Vec<&'static str> {
        let given = [
            (CUDA_CALLS, self.cuda_calls),
            (GPU_DEVICE, !self.gpu_devices.is_empty()),
        ];
        let given = given.into_iter().filter(|(_, is_given)| *is_given);
        given.map(|(flag, _)| flag).collect()
    }

    /// Where pod names come from, the default resolved.
    pub fn source(&self) -> Source {
        let inside = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        self.pods
            .clone()
            .unwrap_or(if inside { Source::Kube } else { Source::None })
    }
}

/// Reads a share of the time.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        // One second in a day and a half: less would be never.
        Ok(share) if (1e-5..=1.0).contains(&share) => Ok(share),
        _ => Err(
            "a share is a number from 0.00001 to 1, such as 0.033 for a second in 30".to_owned(),
        ),
    }
}

/// A path that may be a device's now or later.
fn device_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if !path.is_absolute() {
        return Err("it has to begin with /, as /dev/dri/renderD128 does".to_owned());
    }
    Ok(path)
}

fn signal(name: &str) -> Result<String, String> {
    let names: Vec<_> = crate::signals::SIGNALS
        .iter()
        .map(|entry| entry.name)
        .collect();
    if names.contains(&name) {
        Ok(name.to_owned())
    } else {
        Err(format!("the signals are {}", names.join(", ")))
    }
}

/// Reads `90s`, `5m` or `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    match duration_or_none(text)? {
        Duration::ZERO => Err("it has to be longer than nothing".to_owned()),
        duration => Ok(duration),
    }
}

/// The same, or `0s`.
fn duration_or_none(text: &str) -> Result<Duration, String> {
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        _ => 0,
    };
    let number = text
        .get(..text.len().saturating_sub(1))
        .and_then(|digits| digits.parse::<u64>().ok());
    match number.and_then(|number| number.checked_mul(unit)) {
        Some(seconds) if unit > 0 => Ok(Duration::from_secs(seconds)),
        _ => Err("a duration is a whole number with s, m or h, such as 5m".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(duration_or_none("0s"), Ok(Duration::ZERO));
        for bad in [
            "",
            "5",
            "0s",
            "m",
            "-1s",
            "5 m",
            "99999999999999999999h",
            "5µ",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shares_are_above_0_and_at_most_1() {
        assert_eq!(share("0.033"), Ok(0.033));
        assert_eq!(share("1"), Ok(1.0));
        for bad in ["", "0", "-0.1", "1.01", "3%", "nan", "inf"] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        for argument in Args::command().get_arguments() {
            let id = argument.get_id();
            assert!(
                ["help", "version"].contains(&id.as_str()) || argument.get_env().is_some(),
                "{id}"
            );
        }
    }
}
