// SPDX-License-Identifier: Apache-2.0
//! Basic authentication, with a bound on what strangers can make the node compute.
//!
//! bcrypt takes 0.05 s of a core (cost 10). One hash is computed at a time, the same attempt once however many send it,
//! and few wait ([`WAITING`], [`WAITING_EACH`]): the rest is told to come again. What was found is remembered, so that a
//! scraper's password is hashed once, and under a keyed digest, so that the memory holds no password.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{Arc, Mutex, OnceLock},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use hyper::header::HeaderValue;
use ring::{hmac, rand::SystemRandom};

use super::{Settings, lock};

/// Different attempts that may wait for their hash.
const WAITING: usize = 8;

/// Of which one client address may have so many: a neighbour's guesses leave room for the scraper's first request.
const WAITING_EACH: usize = 3;

/// Attempts that are remembered, of each outcome.
const REMEMBERED: usize = 128;

/// No password of bcrypt is longer than 72 bytes; no name needs to be.
const CREDENTIALS: usize = 1024;

type Digest = [u8; 32];

/// What an attempt came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Right, or nobody is asked.
    Pass,
    /// No credentials, or wrong ones.
    Refuse,
    /// Too many attempts wait.
    Later,
}

/// Remembers attempts and computes the others in turn.
#[derive(Debug, Default)]
pub struct Gate {
    key: OnceLock<Option<hmac::Key>>,
    right: Mutex<Memory>,
    wrong: Mutex<Memory>,
    waiting: Arc<Mutex<Waiting>>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

type Attempt = Shared<BoxFuture<'static, bool>>;

#[derive(Default)]
struct Waiting(HashMap<Digest, (IpAddr, Attempt)>);

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Waiting").field(&self.0.len()).finish()
    }
}

#[derive(Debug, Default)]
struct Memory(VecDeque<Digest>);

impl Memory {
    fn has(&self, digest: &Digest) -> bool {
        self.0.contains(digest)
    }

    fn keep(&mut self, digest: Digest) {
        if !self.has(&digest) {
            self.0.push_back(digest);
            if self.0.len() > REMEMBERED {
                self.0.pop_front();
            }
        }
    }
}

impl Gate {
    /// Whether `authorization`, sent from `client`, names a user and its password.
    pub async fn admit(
        &self,
        settings: &Settings,
        authorization: Option<&HeaderValue>,
        client: IpAddr,
    ) -> Verdict {
        if settings.users.is_empty() {
            return Verdict::Pass;
        }
        let Some((user, password)) = authorization.and_then(credentials) else {
            return Verdict::Refuse;
        };
        // An unknown user costs what the dearest known one does, so that time does not tell who is known.
        let known = settings.users.get(&user);
        let Some(hash) = known.or_else(|| settings.users.values().max_by_key(|hash| cost(hash)))
        else {
            return Verdict::Refuse;
        };
        let Some(digest) = self.digest(&[user.as_bytes(), hash.as_bytes(), &password]) else {
            return Verdict::Later;
        };
        if lock(&self.right).has(&digest) {
            return Verdict::Pass;
        }
        if lock(&self.wrong).has(&digest) {
            return Verdict::Refuse;
        }
        let Some(attempt) = self.attempt(digest, hash.clone(), password, client) else {
            return Verdict::Later;
        };
        let right = attempt.await && known.is_some();
        let memory = if right { &self.right } else { &self.wrong };
        lock(memory).keep(digest);
        if right {
            Verdict::Pass
        } else {
            Verdict::Refuse
        }
    }

    fn attempt(
        &self,
        digest: Digest,
        hash: String,
        password: Vec<u8>,
        client: IpAddr,
    ) -> Option<Attempt> {
        let mut waiting = lock(&self.waiting);
        if let Some((_, attempt)) = waiting.0.get(&digest) {
            return Some(attempt.clone());
        }
        let same = waiting.0.values().filter(|(from, _)| *from == client);
        if waiting.0.len() >= WAITING || same.count() >= WAITING_EACH {
            return None;
        }
        let (turn, others) = (Arc::clone(&self.turn), Arc::clone(&self.waiting));
        // A task of its own: an attempt whose client has left still ends, and gives its place back.
        let computed = tokio::spawn(async move {
            let turn = turn.lock_owned().await;
            let computed = tokio::task::spawn_blocking(move || {
                let right = bcrypt::verify(password, &hash).unwrap_or(false);
                drop(turn);
                right
            });
            let right = computed.await.unwrap_or(false);
            lock(&others).0.remove(&digest);
            right
        });
        let attempt = computed
            .map(|computed| computed.unwrap_or(false))
            .boxed()
            .shared();
        waiting.0.insert(digest, (client, attempt.clone()));
        Some(attempt)
    }

    /// `None` where the kernel gives no randomness, without which the digest would tell the password.
    fn digest(&self, parts: &[&[u8]]) -> Option<Digest> {
        let key = self
            .key
            .get_or_init(|| hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new()).ok());
        let mut context = hmac::Context::with_key(key.as_ref()?);
        for part in parts {
            context.update(&part.len().to_le_bytes());
            context.update(part);
        }
        context.sign().as_ref().try_into().ok()
    }
}

fn cost(hash: &str) -> u32 {
    hash.parse()
        .map_or(0, |parts: bcrypt::HashParts| parts.get_cost())
}

/// User and password of `Basic …` (RFC 7617).
fn credentials(header: &HeaderValue) -> Option<(String, Vec<u8>)> {
    let (scheme, encoded) = header.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") || encoded.len() > CREDENTIALS {
        return None;
    }
    let decoded = BASE64_STANDARD.decode(encoded.trim()).ok()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    let user = String::from_utf8(decoded[..colon].to_vec()).ok()?;
    Some((user, decoded[colon + 1..].to_vec()))
}
