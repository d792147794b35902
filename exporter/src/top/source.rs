// SPDX-License-Identifier: Apache-2.0
//! Where do pages come from: an exporter that runs, or the signals attached here?

use std::{
    fmt, fs, io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, StatusCode, Uri,
    body::Bytes,
    client::conn::http1,
    header::{AUTHORIZATION, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::spawn_blocking,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::reading::Reading;
use crate::{scrape::Front, server::Site};

/// How long the first page may take, which waits until the exporter has attached, and any other.
pub(super) const FIRST: Duration = Duration::from_secs(30);
const LATER: Duration = Duration::from_secs(5);

/// Bytes of a page: ten times what 1000 pods make.
const LARGEST: usize = 64 << 20;

/// Who asks, where the exporter asks for it.
#[derive(Clone, Debug, Default)]
pub struct Login {
    /// A user of `--web.config.file`.
    pub user: Option<String>,
    /// A file with the password.
    pub password: Option<std::path::PathBuf>,
    /// Certificates that an exporter with TLS is believed by, in PEM.
    pub ca: Option<std::path::PathBuf>,
}

/// An exporter's address, and how it is asked.
#[derive(Clone)]
pub struct Remote {
    uri: Uri,
    host: String,
    port: u16,
    authorization: Option<HeaderValue>,
    tls: Option<TlsConnector>,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({self})")
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        match self.host.contains(':') {
            true => write!(f, "{scheme}://[{}]:{}", self.host, self.port),
            false => write!(f, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}

impl Remote {
    /// Reads an address: `http://HOST:PORT` or `https://HOST:PORT`, with a path if it is not `/metrics`.
    ///
    /// # Errors
    /// The user's mistakes.
    pub fn new(url: &str, login: &Login) -> anyhow::Result<Self> {
        let mistake = || {
            anyhow!(
                "cannot read {url:?} as an exporter's address: --url takes http://HOST:PORT or https://HOST:PORT"
            )
        };
        let uri: Uri = url.parse().map_err(|_| mistake())?;
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(mistake()),
        };
        let authority = uri.authority().ok_or_else(mistake)?;
        ensure!(
            !authority.as_str().contains('@'),
            "--url takes no user, which others could read in the list of processes: --user and --password-file do"
        );
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        ensure!(!host.is_empty(), mistake());
        let tls = match (is_tls, &login.ca) {
            (false, _) => None,
            (true, Some(file)) => Some(connector(file)?),
            (true, None) => bail!(
                "whether it is the right exporter that answers on {url} cannot be told: --ca-file names the certificate that signed its own"
            ),
        };
        Ok(Self {
            port: authority
                .port_u16()
                .unwrap_or(if is_tls { 443 } else { 80 }),
            authorization: authorization(login)?,
            host,
            tls,
            uri,
        })
    }

    /// Asks for a page.
    ///
    /// # Errors
    /// When there is none.
    pub async fn page(&self, within: Duration) -> anyhow::Result<String> {
        match timeout(within, self.get()).await {
            Ok(page) => page,
            Err(_) => bail!("no answer in {} s", within.as_secs()),
        }
    }

    async fn get(&self) -> anyhow::Result<String> {
        let stream = TcpStream::connect((&*self.host, self.port)).await?;
        match &self.tls {
            None => self.exchange(stream).await,
            Some(tls) => {
                let name = ServerName::try_from(self.host.clone())?;
                let stream = tls.connect(name, stream).await;
                self.exchange(stream.context("its TLS")?).await
            }
        }
    }

    async fn exchange<S>(&self, stream: S) -> anyhow::Result<String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the sender, and tells the sender what went wrong.
        tokio::spawn(connection);
        let path = match self.uri.path() {
            "/" | "" => "/metrics",
            path => path,
        };
        let mut request =
            Request::get(path).header(HOST, self.uri.authority().map_or("", |a| a.as_str()));
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let request = request.body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await.map_err(|error| {
            // A server with TLS closes what is no handshake, or answers with an alert.
            match self.tls {
                None => anyhow!(
                    "it does not answer in HTTP ({error}); with TLS its --url begins with https://"
                ),
                Some(_) => anyhow!(error),
            }
        })?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LARGEST).collect().await;
        let body = body
            .map_err(|error| anyhow!("its page: {error}"))?
            .to_bytes();
        match status {
            StatusCode::OK => Ok(String::from_utf8(body.into())?),
            StatusCode::UNAUTHORIZED => {
                bail!("it asks for a user and a password: --user and --password-file")
            }
            status => {
                let text = String::from_utf8_lossy(&body[..body.len().min(200)]);
                let why = text.lines().next().unwrap_or_default();
                bail!("it answers {status}: {why}")
            }
        }
    }
}

/// Whether nobody listens there, rather than that somebody does not answer.
pub(super) fn is_nobody(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

fn connector(file: &Path) -> anyhow::Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    let tried = || format!("read certificates from {} (--ca-file)", file.display());
    for certificate in CertificateDer::pem_file_iter(file).with_context(tried)? {
        roots
            .add(certificate.with_context(tried)?)
            .with_context(tried)?;
    }
    ensure!(
        !roots.is_empty(),
        "{} (--ca-file) has no certificate in PEM",
        file.display()
    );
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn authorization(login: &Login) -> anyhow::Result<Option<HeaderValue>> {
    let (user, file) = match (&login.user, &login.password) {
        (None, None) => return Ok(None),
        (Some(user), Some(file)) => (user, file),
        _ => bail!("--user and --password-file go together"),
    };
    let password = fs::read_to_string(file);
    let password =
        password.with_context(|| format!("read {} (--password-file)", file.display()))?;
    let password = password.trim_end_matches(['\n', '\r']);
    let word = BASE64_STANDARD.encode(format!("{user}:{password}"));
    let mut value = HeaderValue::from_str(&format!("Basic {word}"))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// Where pages come from.
#[derive(Clone)]
pub(super) enum Source {
    /// An exporter that runs.
    Remote(Remote),
    /// The signals that were attached for this.
    Here(Arc<Front>),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Remote(remote) => remote.fmt(f),
            Self::Here(_) => f.write_str("attached here"),
        }
    }
}

impl Source {
    /// The next page, read.
    pub(super) async fn reading(&self) -> anyhow::Result<Reading> {
        let at = Instant::now();
        // A page of many pods takes a while to read, in which keys are still answered.
        match self {
            Self::Remote(remote) => {
                let page = remote.page(LATER).await?;
                spawn_blocking(move || Reading::of(&page, at)).await?
            }
            Self::Here(front) => {
                let front = Arc::clone(front);
                let read = move || Reading::of(&String::from_utf8(front.metrics()?)?, at);
                spawn_blocking(read).await?
            }
        }
    }
}
