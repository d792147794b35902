// SPDX-License-Identifier: Apache-2.0
//! Who may read the pages, and over what: the file of `--web.config.file`, in the format of Prometheus'
//! exporter-toolkit 0.14 (`docs/web-configuration.md` there).
//!
//! The file, and those that it names, are looked at for each connection and request, and read again when one has changed.
//! A file that cannot be read then, or that would take TLS, client certificates or the users away, changes nothing: what
//! was read last stays, and `chandra_web_config_last_reload_successful` is 0.

mod basic;
mod tls;

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
pub use basic::{Gate, Verdict};
use hyper::header::{HeaderName, HeaderValue};
use serde::{Deserialize, Deserializer};
pub use tls::Tls;

use crate::lock::lock;

/// The least time between two looks at the files: a flood of requests costs no more.
const LOOK: Duration = Duration::from_millis(100);

/// The least time between two log lines on a file that cannot be used.
const LOG: Duration = Duration::from_secs(60);

/// Far more than any such file has; a mistaken path (`/dev/zero`) must not fill the memory.
const FILE_BYTES: u64 = 1 << 20;

/// The whole file. A key with nothing behind it is as good as absent, as in Go.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    #[serde(deserialize_with = "or_default")]
    tls_server_config: tls::Raw,
    #[serde(deserialize_with = "or_default")]
    http_server_config: RawHttp,
    #[serde(deserialize_with = "or_default")]
    basic_auth_users: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_default")]
    rate_limit: RawRate,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawHttp {
    /// Read, and without effect: HTTP/1.1 is served.
    #[serde(rename = "http2")]
    _http2: Option<bool>,
    #[serde(deserialize_with = "or_default")]
    headers: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRate {
    #[serde(deserialize_with = "or_default")]
    interval: String,
    burst: Option<u32>,
}

fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Option::deserialize(from).map(Option::unwrap_or_default)
}

/// What one state of the files says.
#[derive(Default)]
pub struct Settings {
    /// TLS, if there is any.
    pub tls: Option<Tls>,
    /// Headers of every response.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// bcrypt hashes by user; empty: nobody is asked.
    pub users: HashMap<String, String>,
    /// Time between two requests in the long run, and how many may come at once.
    pub rate: Option<(Duration, u32)>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").finish_non_exhaustive()
    }
}

/// One file as it was when it was read. A write within the clock's tick that keeps the size has another ctime or inode
/// in practice: Kubernetes changes secrets by a symbolic link, and editors by a rename.
#[derive(Debug, PartialEq, Eq)]
struct Stamp(PathBuf, Option<Seen>);

/// Device, inode, size, and the times of the last write and of the last change of the inode.
type Seen = (u64, u64, u64, (i64, i64), (i64, i64));

impl Stamp {
    fn of(path: &Path) -> Self {
        let seen = fs::metadata(path).ok().map(|file| {
            (
                file.dev(),
                file.ino(),
                file.size(),
                (file.mtime(), file.mtime_nsec()),
                (file.ctime(), file.ctime_nsec()),
            )
        });
        Self(path.to_owned(), seen)
    }

    fn stale(&self) -> bool {
        Self::of(&self.0) != *self
    }
}

/// Reads files and remembers what they looked like before that.
#[derive(Default)]
struct Reader {
    stamps: Vec<Stamp>,
}

impl Reader {
    fn read(&mut self, path: &Path) -> io::Result<String> {
        use io::Read;
        self.stamps.push(Stamp::of(path));
        let mut text = String::new();
        let file = fs::File::open(path)?;
        if file.metadata()?.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        file.take(FILE_BYTES + 1).read_to_string(&mut text)?;
        if text.len() as u64 > FILE_BYTES {
            return Err(io::Error::other("it is longer than 1 MiB"));
        }
        Ok(text)
    }
}

/// The settings in force, and how they are kept up to date.
#[derive(Debug, Default)]
pub struct Web {
    path: Option<PathBuf>,
    state: Mutex<State>,
    /// Held while files are looked at, which may take long on a remote file system.
    looking: tokio::sync::Mutex<()>,
    failed: AtomicBool,
    /// Basic authentication.
    pub gate: Gate,
    bucket: Mutex<Bucket>,
}

#[derive(Debug, Default)]
struct State {
    settings: Arc<Settings>,
    stamps: Vec<Stamp>,
    looked: Option<Instant>,
    told: Option<Instant>,
}

impl Web {
    /// Reads the file.
    ///
    /// # Errors
    /// One line that names the file and what is wrong in it.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let mut reader = Reader::default();
        let settings = Settings::read(path, &mut reader)?;
        Ok(Self {
            path: Some(path.to_owned()),
            state: Mutex::new(State {
                settings: Arc::new(settings),
                stamps: reader.stamps,
                looked: None,
                told: None,
            }),
            ..Self::default()
        })
    }

    /// Whether the files could be used when they last changed; `None` without a file.
    pub fn reloaded(&self) -> Option<bool> {
        self.path.as_ref().map(|_| !self.failed.load(Relaxed))
    }

    /// Whether it serves TLS, which no reload changes from yes to no.
    pub fn https(&self) -> bool {
        self.state().settings.tls.is_some()
    }

    /// The settings in force, after a look at the files.
    pub async fn settings(self: &Arc<Self>) -> Arc<Settings> {
        if self.path.is_some() && self.due() {
            let _looking = self.looking.lock().await;
            // Whoever waited for another's look does not look again.
            if self.due() {
                let web = Arc::clone(self);
                let _ = tokio::task::spawn_blocking(move || web.look()).await;
            }
        }
        Arc::clone(&self.state().settings)
    }

    /// Takes one request from the rate limit.
    pub fn allows(&self, rate: (Duration, u32)) -> bool {
        lock(&self.bucket).take(rate, Instant::now())
    }

    fn due(&self) -> bool {
        self.state()
            .looked
            .is_none_or(|looked| looked.elapsed() >= LOOK)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn look(&self) {
        let Some(path) = &self.path else { return };
        let stamps = std::mem::take(&mut self.state().stamps);
        let changed = stamps.iter().any(Stamp::stale);
        if !changed {
            let mut state = self.state();
            state.stamps = stamps;
            state.looked = Some(Instant::now());
            return;
        }
        let mut reader = Reader::default();
        let read = Settings::read(path, &mut reader);
        let mut state = self.state();
        state.stamps = reader.stamps;
        state.looked = Some(Instant::now());
        let read = read.and_then(|settings| {
            settings.no_weaker_than(&state.settings, path)?;
            Ok(settings)
        });
        self.failed.store(read.is_err(), Relaxed);
        match read {
            Ok(settings) => {
                tracing::info!("read {} again", path.display());
                state.settings = Arc::new(settings);
                state.told = None;
            }
            Err(error) => {
                if state.told.is_none_or(|told| told.elapsed() >= LOG) {
                    tracing::error!("{error:#}; what was read before stays in force");
                    state.told = Some(Instant::now());
                }
            }
        }
    }
}

impl Settings {
    fn read(path: &Path, reader: &mut Reader) -> anyhow::Result<Self> {
        let shown = path.display();
        let text = reader.read(path).map_err(|error| {
            anyhow!("cannot read {shown} ({error}): --web.config.file takes a file in the format of Prometheus' exporter-toolkit")
        })?;
        Self::parse(&text, path, reader).with_context(|| format!("cannot use {shown}"))
    }

    fn parse(text: &str, path: &Path, reader: &mut Reader) -> anyhow::Result<Self> {
        let options = serde_saphyr::options! { with_snippet: false };
        let broken = |error: serde_saphyr::Error| {
            let line = error.to_string();
            anyhow!(line.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        let raw: Option<Raw> = if text.trim().is_empty() {
            None
        } else {
            serde_saphyr::from_str_with_options(text, options).map_err(broken)?
        };
        let raw = raw.unwrap_or_default();
        let directory = path.parent().unwrap_or(Path::new(""));
        Ok(Self {
            tls: Tls::build(&raw.tls_server_config, directory, reader)
                .context("tls_server_config")?,
            headers: headers(&raw.http_server_config.headers)?,
            users: users(raw.basic_auth_users)?,
            rate: raw.rate_limit.read().context("rate_limit")?,
        })
    }

    /// A file that is cut short must not open the server.
    fn no_weaker_than(&self, before: &Self, path: &Path) -> anyhow::Result<()> {
        let shown = path.display();
        let mandatory = |settings: &Self| settings.tls.as_ref().is_some_and(|tls| tls.verified);
        let lost = if before.tls.is_some() && self.tls.is_none() {
            "TLS"
        } else if mandatory(before) && !mandatory(self) {
            "the need for client certificates"
        } else if !before.users.is_empty() && self.users.is_empty() {
            "all users"
        } else {
            return Ok(());
        };
        bail!("{shown} takes {lost} away, which only a restart does")
    }
}

/// The headers that the toolkit knows, with the values that it allows; an empty list allows all.
const HEADERS: &[(&str, &[&str])] = &[
    ("Strict-Transport-Security", &[]),
    ("X-Content-Type-Options", &["nosniff"]),
    ("X-Frame-Options", &["deny", "sameorigin"]),
    ("X-XSS-Protection", &[]),
    ("Content-Security-Policy", &[]),
];

fn headers(raw: &BTreeMap<String, String>) -> anyhow::Result<Vec<(HeaderName, HeaderValue)>> {
    let mut headers = Vec::new();
    for (name, value) in raw {
        let Some((_, allowed)) = HEADERS.iter().find(|(known, _)| known == name) else {
            let known: Vec<_> = HEADERS.iter().map(|(name, _)| *name).collect();
            bail!(
                "http_server_config: the header {name:?} cannot be set; those that can are {}",
                known.join(", ")
            );
        };
        if value.is_empty() {
            continue;
        }
        ensure!(
            allowed.is_empty() || allowed.contains(&value.as_str()),
            "http_server_config: {name} takes {}, not {value:?}",
            allowed.join(" or ")
        );
        let value = HeaderValue::from_str(value).map_err(|_| {
            anyhow!("http_server_config: {name} has a character that a header cannot hold")
        })?;
        headers.push((HeaderName::from_bytes(name.as_bytes())?, value));
    }
    Ok(headers)
}

/// More takes seconds of a core for each wrong password.
const COST: u32 = 16;

fn users(raw: BTreeMap<String, String>) -> anyhow::Result<HashMap<String, String>> {
    for (user, hash) in &raw {
        let at = format!("basic_auth_users: {user:?}");
        ensure!(
            !user.contains(':'),
            "{at}: a name with a colon cannot be sent"
        );
        // The hash is a secret: no error shows it.
        let parts: bcrypt::HashParts = hash.parse().map_err(|_| {
            anyhow!("{at} has no bcrypt hash: make one with `htpasswd -nBC 10 {user}`")
        })?;
        ensure!(
            (4..=COST).contains(&parts.get_cost()),
            "{at}: the hash has cost {}, and a wrong password would take seconds of a core: 4 to {COST} are taken",
            parts.get_cost()
        );
    }
    Ok(raw.into_iter().collect())
}

impl RawRate {
    fn read(&self) -> anyhow::Result<Option<(Duration, u32)>> {
        let interval = go_duration(&self.interval)?;
        if interval.is_zero() {
            return Ok(None);
        }
        match self.burst {
            Some(burst) if burst > 0 => Ok(Some((interval, burst))),
            _ => {
                bail!(
                    "an interval needs a burst of at least 1, without which no request would pass"
                )
            }
        }
    }
}

/// Reads a duration as Go writes it: `1s`, `250ms`, `1m30s`; empty is 0.
fn go_duration(text: &str) -> anyhow::Result<Duration> {
    let wrong = || anyhow!("interval: {text:?} is no duration such as 1s, 250ms or 1m30s");
    let mut total = 0.0;
    let mut rest = text;
    if rest == "0" {
        rest = "";
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit = &rest[digits..];
        let end = unit
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(unit.len());
        let scale = match &unit[..end] {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(wrong()),
        };
        total += number * scale;
        rest = &unit[end..];
    }
    Duration::try_from_secs_f64(total).map_err(|_| wrong())
}

/// A token bucket.
#[derive(Debug, Default)]
struct Bucket {
    tokens: f64,
    at: Option<Instant>,
}

impl Bucket {
    fn take(&mut self, (interval, burst): (Duration, u32), now: Instant) -> bool {
        let burst = f64::from(burst);
        let grown = self.at.map_or(burst, |at| {
            let passed = now.saturating_duration_since(at).as_secs_f64();
            (self.tokens + passed / interval.as_secs_f64()).min(burst)
        });
        self.at = Some(now);
        let passes = grown >= 1.0;
        self.tokens = if passes { grown - 1.0 } else { grown };
        passes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        for (text, seconds) in [
            ("", 0.0),
            ("0", 0.0),
            ("1s", 1.0),
            ("250ms", 0.25),
            ("1m30s", 90.0),
            ("1.5h", 5400.0),
            ("10us", 1e-5),
        ] {
            assert_eq!(
                go_duration(text).expect(text),
                Duration::from_secs_f64(seconds),
                "{text}"
            );
        }
        for bad in [
            "1",
            "s",
            "1x",
            "-1s",
            "1 s",
            "1..5s",
            "99999999999999999999h",
        ] {
            assert!(go_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bucket_lets_a_burst_through_and_then_one_per_interval() {
        let mut bucket = Bucket::default();
        let rate = (Duration::from_secs(1), 2);
        let start = Instant::now();
        let taken = |bucket: &mut Bucket, after: u64| {
            bucket.take(rate, start + Duration::from_millis(after))
        };
        assert!(taken(&mut bucket, 0));
        assert!(taken(&mut bucket, 0));
        assert!(!taken(&mut bucket, 500));
        assert!(taken(&mut bucket, 1000));
        assert!(!taken(&mut bucket, 1001));
        assert!(taken(&mut bucket, 60_000));
        assert!(taken(&mut bucket, 60_000));
        assert!(!taken(&mut bucket, 60_000), "a rest saves up one burst");
    }
}
