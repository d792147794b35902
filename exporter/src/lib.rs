// SPDX-License-Identifier: Apache-2.0
//! Chandra: a Prometheus exporter of what Hubble leaves dark for AI workloads.
//!
//! Data flows one way: kernel event → map → [`signals`] read → [`ledger`] → render → [`server`].
#![forbid(unsafe_code)]

pub mod app;
pub mod args;
pub mod capabilities;
pub mod check;
pub mod families;
pub mod hook;
pub mod kernel;
pub mod ledger;
pub mod libraries;
mod lock;
pub mod losses;
pub mod maps;
pub mod page;
pub mod plugin;
pub mod pods;
pub mod probe;
pub mod reference;
pub mod scrape;
pub mod server;
pub mod signals;
pub mod top;
pub mod web;

/// The version of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
