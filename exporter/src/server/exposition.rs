// SPDX-License-Identifier: Apache-2.0
//! How do several who ask at once share one scrape, and its compression?

use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use flate2::{Compression, write::GzEncoder};
use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use hyper::{HeaderMap, body::Bytes, header};
use tokio::task::spawn_blocking;

use super::{Seldom, Site};
use crate::lock::lock;

/// Whether `Accept-Encoding` allows gzip and does not prefer the plain text (RFC 9110, section 12.5.3).
/// A weight that cannot be read counts as 0: everybody reads plain text.
pub(super) fn accepts_gzip(headers: &HeaderMap) -> bool {
    let (mut gzip, mut any, mut plain) = (None, None, None);
    let lines = headers.get_all(header::ACCEPT_ENCODING).iter();
    for coding in lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
    {
        let (name, weight) = match coding.split_once(';') {
            Some((name, weight)) => (name, quality(weight)),
            None => (coding, 1.0),
        };
        match name.trim().to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => gzip = Some(weight),
            "*" => any = Some(weight),
            "identity" => plain = Some(weight),
            _ => {}
        }
    }
    let gzip = gzip.or(any).unwrap_or(0.0);
    gzip > 0.0 && gzip >= plain.unwrap_or(0.0)
}

fn quality(parameter: &str) -> f32 {
    parameter
        .split_once('=')
        .filter(|(name, _)| name.trim().eq_ignore_ascii_case("q"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .filter(|value| (0.0..=1.0).contains(value))
        .unwrap_or(0.0)
}

/// The error is the one line that every sharer is shown.
pub(super) type Outcome<T> = Result<T, Arc<str>>;

/// Runs once, however many wait for it.
pub(super) type Once<T> = Shared<BoxFuture<'static, Outcome<T>>>;

#[derive(Clone)]
pub(super) struct Exposition {
    pub(super) plain: Bytes,
    /// Compressed when the first sharer asks for it.
    pub(super) gzip: Once<Bytes>,
}

/// Shares scrapes: whoever asks gets one that starts after it asked, so that no answer is stale,
/// together with all who asked before that start.
pub(super) struct Scrapes<S> {
    site: Arc<S>,
    /// Held while [`Site::metrics`] runs, also when every client that waited for it has left.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// The scrape that has not started yet.
    next: Arc<Mutex<Option<Once<Exposition>>>>,
    log: Arc<Seldom>,
}

impl<S: Site> Scrapes<S> {
    pub(super) fn new(site: Arc<S>) -> Self {
        Self {
            site,
            turn: Arc::default(),
            next: Arc::default(),
            log: Arc::default(),
        }
    }

    pub(super) fn join(&self) -> Once<Exposition> {
        lock(&self.next)
            .get_or_insert_with(|| {
                let (site, turn) = (Arc::clone(&self.site), Arc::clone(&self.turn));
                let (next, log) = (Arc::clone(&self.next), Arc::clone(&self.log));
                async move {
                    let turn = turn.lock_owned().await;
                    // Whoever asks from here on waits for the scrape after this one.
                    lock(&next).take();
                    let scraped = spawn_blocking(move || {
                        let scraped = site.metrics();
                        drop(turn);
                        scraped
                    });
                    let scraped = scraped.await.unwrap_or_else(|error| Err(error.into()));
                    scraped.map(Exposition::new).map_err(|error| {
                        let line = one_line(&error);
                        if log.due() {
                            tracing::warn!(error = %line, "scrape");
                        }
                        line
                    })
                }
                .boxed()
                .shared()
            })
            .clone()
    }
}

impl Exposition {
    fn new(plain: Vec<u8>) -> Self {
        let plain = Bytes::from(plain);
        let text = plain.clone();
        let gzip = async move {
            spawn_blocking(move || compress(&text))
                .await
                .map_err(|error| one_line(&error.into()))
        };
        Self {
            plain,
            gzip: gzip.boxed().shared(),
        }
    }
}

/// The fastest level: it makes an exposition five to ten times smaller, and the slowest only a quarter smaller still.
fn compress(text: &[u8]) -> Bytes {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(text)
        .and_then(|()| gzip.finish())
        .expect("a vector takes every write")
        .into()
}

pub(super) fn one_line(error: &anyhow::Error) -> Arc<str> {
    let line = format!("{error:#}");
    line.split_whitespace().collect::<Vec<_>>().join(" ").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sharers_of_an_exposition_share_one_compression() {
        let exposition = Exposition::new(b"up 1\n".to_vec());
        let (one, other) = (exposition.clone().gzip.await, exposition.gzip.await);
        let buffer = |gzip: Outcome<Bytes>| gzip.expect("compressed").as_ptr();
        assert_eq!(buffer(one), buffer(other));
    }
}
