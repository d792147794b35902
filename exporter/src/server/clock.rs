// SPDX-License-Identifier: Apache-2.0
//! Until when has the client of a connection to act?

use std::{
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::Mutex,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::Notify,
    time::{Instant, sleep_until},
};
use tokio_rustls::server::TlsStream;

use super::Limits;
use crate::lock::lock;

/// How long a client of this network takes to send a header.
const PROMPT: Duration = Duration::from_millis(500);

/// What a connection waits for, with the deadline where the client is the one who must act.
#[derive(Clone, Copy)]
pub(super) enum Phase {
    Header(Instant),
    Busy,
    Idle(Instant),
}

/// The deadline of one connection. It moves only while the task of the connection is polled, so that task,
/// which polls [`Clock::expired`] last, needs no wake-up to see the move.
pub(super) struct Clock {
    header: Duration,
    /// The phase, and its start.
    phase: Mutex<(Phase, Instant)>,
    pub(super) evicted: Notify,
}

impl Clock {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            header: limits.header,
            phase: Mutex::new((
                Phase::Header(Instant::now() + limits.header),
                Instant::now(),
            )),
            evicted: Notify::new(),
        }
    }

    pub(super) fn enter(&self, phase: Phase) {
        *lock(&self.phase) = (phase, Instant::now());
    }

    /// Since when the client is the one who must act, and before that, whether it is at rest and not in a header that it does not finish.
    pub(super) fn resting(&self) -> Option<(bool, Instant)> {
        let (phase, since) = *lock(&self.phase);
        match phase {
            Phase::Busy => None,
            Phase::Header(_) => Some((since.elapsed() < PROMPT, since)),
            Phase::Idle(_) => Some((true, since)),
        }
    }

    /// The start of a header that came while the request before it was answered keeps the idle deadline.
    fn bytes_read(&self) {
        let mut phase = lock(&self.phase);
        if matches!(phase.0, Phase::Idle(_)) {
            *phase = (Phase::Header(Instant::now() + self.header), Instant::now());
        }
    }

    pub(super) async fn expired(&self) {
        let mut sleep = pin!(sleep_until(Instant::now()));
        poll_fn(|cx| {
            let (phase, _) = *lock(&self.phase);
            match phase {
                Phase::Busy => Poll::Pending,
                Phase::Header(deadline) | Phase::Idle(deadline) => {
                    if sleep.deadline() != deadline {
                        sleep.as_mut().reset(deadline);
                    }
                    sleep.as_mut().poll(cx)
                }
            }
        })
        .await;
    }
}

/// What carries HTTP.
pub(super) enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Wire {
    pub(super) fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }
}

/// A stream that tells the clock when bytes arrive.
pub(super) struct Clocked<'a> {
    pub(super) wire: Wire,
    pub(super) clock: &'a Clock,
}

impl AsyncRead for Clocked<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Wire::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        })?;
        if buffer.filled().len() > before {
            self.clock.bytes_read();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Clocked<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Wire::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Wire::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.wire {
            Wire::Plain(stream) => stream.is_write_vectored(),
            Wire::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Wire::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
