// SPDX-License-Identifier: Apache-2.0
//! On which address is listened, and what if it cannot be had?

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::anyhow;
use tokio::net::{TcpListener, lookup_host};

/// Listens on `address`: `HOST:PORT`, or `:PORT` for every interface, IPv4 and IPv6 alike.
///
/// A name that has both kinds of address is listened to on IPv4. With the sysctl `net.ipv6.bindv6only`
/// set, `:PORT` leaves out IPv4.
pub async fn bind(address: &str) -> anyhow::Result<TcpListener> {
    let (host, port) = split(address).ok_or_else(|| {
        anyhow!(
            "cannot read {address:?} as an address to listen on: --web.listen-address takes HOST:PORT or :PORT, \
             such as 127.0.0.1:9970, [::1]:9970 or :9970"
        )
    })?;
    let explain = |error: io::Error| explain(address, &error);
    if host.is_empty() {
        return match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied
                ) =>
            {
                // The kernel was started without IPv6.
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
                    .await
                    .map_err(explain)
            }
            bound => bound.map_err(explain),
        };
    }
    let found: Vec<SocketAddr> = lookup_host((host, port))
        .await
        .map_err(|error| {
            anyhow!(
                "cannot find the host of {address:?} ({error}): give --web.listen-address an address of this host"
            )
        })?
        .collect();
    let first = preferred(&found).ok_or_else(|| {
        anyhow!("the host of {address:?} has no address: give --web.listen-address an address of this host")
    })?;
    TcpListener::bind(first).await.map_err(explain)
}

/// Host and port; an empty host is every interface. The brackets of an IPv6 address are required.
fn split(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port = port.parse().ok()?;
    match host.strip_prefix('[') {
        Some(rest) => rest
            .strip_suffix(']')
            .filter(|host| host.contains(':'))
            .map(|host| (host, port)),
        None => (!host.contains([':', ']'])).then_some((host, port)),
    }
}

/// The first IPv4 address, if there is one: clients that know only IPv4 expect `localhost` there.
fn preferred(found: &[SocketAddr]) -> Option<SocketAddr> {
    let ipv4 = found.iter().find(|address| address.is_ipv4());
    ipv4.or(found.first()).copied()
}

fn explain(address: &str, error: &io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::AddrInUse => anyhow!(
            "{address} is already in use: stop the program that listens there, or choose another address with \
             --web.listen-address"
        ),
        io::ErrorKind::PermissionDenied => anyhow!(
            "no permission to listen on {address}: choose a port of 1024 or above with --web.listen-address, or \
             grant CAP_NET_BIND_SERVICE"
        ),
        io::ErrorKind::AddrNotAvailable => anyhow!(
            "{address} is not an address of this host: choose another with --web.listen-address"
        ),
        _ => anyhow!(
            "cannot listen on {address} ({error}): choose another address with --web.listen-address"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_addresses_of_both_kinds_is_listened_to_on_ipv4() {
        let ipv6 = SocketAddr::from((Ipv6Addr::LOCALHOST, 1));
        let ipv4 = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        assert_eq!(preferred(&[ipv6, ipv4]), Some(ipv4));
        assert_eq!(preferred(&[ipv6]), Some(ipv6));
        assert_eq!(preferred(&[]), None);
    }

    #[test]
    fn a_denied_port_says_what_to_do() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        assert_eq!(
            explain(":80", &denied).to_string(),
            "no permission to listen on :80: choose a port of 1024 or above with --web.listen-address, or grant \
             CAP_NET_BIND_SERVICE"
        );
    }
}
