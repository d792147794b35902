// SPDX-License-Identifier: Apache-2.0
//! `tls_server_config`: certificates, client certificates, versions, suites and curves, as rustls offers them.

use std::{net::IpAddr, path::Path, sync::Arc};

use anyhow::{Context, anyhow, bail, ensure};
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version,
};
use serde::Deserialize;
use x509_cert::{
    Certificate,
    der::Decode,
    ext::pkix::{SubjectAltName, name::GeneralName},
};

use super::{Reader, or_default};

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    #[serde(deserialize_with = "or_default")]
    cert: String,
    #[serde(deserialize_with = "or_default")]
    cert_file: String,
    #[serde(deserialize_with = "or_default")]
    key: String,
    #[serde(deserialize_with = "or_default")]
    key_file: String,
    #[serde(deserialize_with = "or_default")]
    client_ca: String,
    #[serde(deserialize_with = "or_default")]
    client_ca_file: String,
    #[serde(deserialize_with = "or_default")]
    client_auth_type: String,
    #[serde(deserialize_with = "or_default")]
    client_allowed_sans: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    min_version: String,
    #[serde(deserialize_with = "or_default")]
    max_version: String,
    #[serde(deserialize_with = "or_default")]
    cipher_suites: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    curve_preferences: Vec<String>,
    prefer_server_cipher_suites: Option<bool>,
}

/// How connections are encrypted.
#[derive(Clone, Debug)]
pub struct Tls {
    /// For the handshake.
    pub config: Arc<ServerConfig>,
    /// Whether every client has to show a certificate.
    pub demanded: bool,
    /// Whether every client has to show a certificate of the configured authority.
    pub verified: bool,
}

impl Tls {
    pub(super) fn build(
        raw: &Raw,
        directory: &Path,
        reader: &mut Reader,
    ) -> anyhow::Result<Option<Self>> {
        let named = [
            &raw.cert,
            &raw.cert_file,
            &raw.key,
            &raw.key_file,
            &raw.client_ca,
            &raw.client_ca_file,
            &raw.client_auth_type,
        ];
        if named.iter().all(|value| value.is_empty()) {
            // What is left says nothing on its own, and whoever wrote it meant TLS.
            let rest = !raw.client_allowed_sans.is_empty()
                || !raw.cipher_suites.is_empty()
                || !raw.curve_preferences.is_empty()
                || !raw.min_version.is_empty()
                || !raw.max_version.is_empty();
            ensure!(!rest, "missing one of cert or cert_file");
            return Ok(None);
        }
        let chain = pem("cert", &raw.cert, &raw.cert_file, directory, reader)?
            .context("missing one of cert or cert_file")?;
        let key = pem("key", &raw.key, &raw.key_file, directory, reader)?
            .context("missing one of key or key_file")?;
        let authorities = pem(
            "client_ca",
            &raw.client_ca,
            &raw.client_ca_file,
            directory,
            reader,
        )?;
        let policy = Policy::read(&raw.client_auth_type)?;
        ensure!(
            authorities.is_none() || policy != Policy::None,
            "client_ca has no effect without client_auth_type: set it to RequireAndVerifyClientCert"
        );
        ensure!(
            raw.client_allowed_sans.is_empty() || policy != Policy::None,
            "client_allowed_sans has no effect without client_auth_type: set it to RequireAndVerifyClientCert"
        );

        let provider = Arc::new(CryptoProvider {
            cipher_suites: suites(&raw.cipher_suites)?,
            kx_groups: groups(&raw.curve_preferences)?,
            ..ring::default_provider()
        });
        let demanded = matches!(policy, Policy::RequireAny | Policy::RequireAndVerify);
        let verifier = Verifier {
            chain: policy.chain(authorities.as_deref(), &provider)?,
            mandatory: demanded,
            allowed: raw.client_allowed_sans.clone(),
            algorithms: provider.signature_verification_algorithms,
        };
        let builder = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions(&raw.min_version, &raw.max_version)?)
            .map_err(|error| {
                anyhow!("cipher_suites and the versions leave nothing to offer ({error})")
            })?;
        let builder = if policy == Policy::None {
            builder.with_no_client_auth()
        } else {
            builder.with_client_cert_verifier(Arc::new(verifier))
        };
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|error| anyhow!("key: no unencrypted private key in PEM ({error})"))?;
        let mut config = builder
            .with_single_cert(certificates("cert", &chain)?, key)
            .map_err(|error| anyhow!("the certificate and the key do not go together ({error})"))?;
        config.ignore_client_order = raw.prefer_server_cipher_suites.unwrap_or(true);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Some(Self {
            config: Arc::new(config),
            demanded,
            verified: policy == Policy::RequireAndVerify,
        }))
    }
}

/// The text under `key`, or of the file under `key`_file, which wins as in the toolkit.
fn pem(
    key: &str,
    text: &str,
    file: &str,
    directory: &Path,
    reader: &mut Reader,
) -> anyhow::Result<Option<String>> {
    if file.is_empty() {
        return Ok((!text.is_empty()).then(|| text.to_owned()));
    }
    let path = directory.join(file);
    let text = reader
        .read(&path)
        .map_err(|error| anyhow!("cannot read {key}_file {} ({error})", path.display()))?;
    Ok(Some(text))
}

fn certificates(key: &str, pem: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let read = read.map_err(|error| anyhow!("{key}: no certificate in PEM ({error})"))?;
    ensure!(!read.is_empty(), "{key}: no certificate in PEM");
    Ok(read)
}

fn versions(min: &str, max: &str) -> anyhow::Result<Vec<&'static SupportedProtocolVersion>> {
    let number = |key: &str, name: &str, default: u8| match name {
        "" => Ok(default),
        "TLS12" => Ok(2),
        "TLS13" => Ok(3),
        "TLS10" | "TLS11" => Err(anyhow!(
            "{key}: {name} is not offered, being broken (RFC 8996): TLS12 and TLS13 are"
        )),
        _ => Err(anyhow!(
            "{key}: {name:?} is no version: TLS12 and TLS13 are"
        )),
    };
    let (min, max) = (
        number("min_version", min, 2)?,
        number("max_version", max, 3)?,
    );
    ensure!(min <= max, "min_version is above max_version");
    let all = [(2, &version::TLS12), (3, &version::TLS13)];
    Ok(all
        .into_iter()
        .filter(|(number, _)| (min..=max).contains(number))
        .map(|(_, version)| version)
        .collect())
}

/// Go's names of the suites of TLS 1.2 that rustls has, and rustls' names of them.
const SUITES: &[(&str, rustls::CipherSuite)] = {
    use rustls::CipherSuite as S;
    &[
        (
            "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
            S::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        ),
        (
            "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
            S::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        ),
        (
            "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
            S::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        ),
        (
            "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
            S::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        ),
        (
            "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
            S::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        ),
        (
            "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
            S::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        ),
    ]
};

/// Go takes these names, and offers all suites of TLS 1.3 whatever the list says.
const SUITES_13: &[&str] = &[
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
];

fn suites(names: &[String]) -> anyhow::Result<Vec<rustls::SupportedCipherSuite>> {
    let all = ring::default_provider().cipher_suites;
    if names.is_empty() {
        return Ok(all);
    }
    let mut chosen: Vec<_> = all
        .iter()
        .filter(|suite| suite.tls13().is_some())
        .copied()
        .collect();
    for name in names {
        if SUITES_13.contains(&name.as_str()) {
            continue;
        }
        let Some((_, id)) = SUITES.iter().find(|(known, _)| known == name) else {
            let known: Vec<_> = SUITES.iter().map(|(name, _)| *name).collect();
            bail!(
                "cipher_suites: {name:?} is not offered, as no suite with CBC, RC4 or without ECDHE is: {} are",
                known.join(", ")
            );
        };
        chosen.extend(all.iter().filter(|suite| suite.suite() == *id));
    }
    Ok(chosen)
}

fn groups(names: &[String]) -> anyhow::Result<Vec<&'static dyn rustls::crypto::SupportedKxGroup>> {
    use ring::kx_group::{SECP256R1, SECP384R1, X25519};
    if names.is_empty() {
        return Ok(ring::default_provider().kx_groups);
    }
    let group = |name: &String| match name.as_str() {
        "X25519" => Ok(X25519),
        "CurveP256" => Ok(SECP256R1),
        "CurveP384" => Ok(SECP384R1),
        _ => Err(anyhow!(
            "curve_preferences: {name:?} is not offered: X25519, CurveP256 and CurveP384 are"
        )),
    };
    names.iter().map(group).collect()
}

/// `client_auth_type`, by Go's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Policy {
    None,
    Request,
    RequireAny,
    VerifyIfGiven,
    RequireAndVerify,
}

impl Policy {
    fn read(name: &str) -> anyhow::Result<Self> {
        Ok(match name {
            "" | "NoClientCert" => Self::None,
            "RequestClientCert" => Self::Request,
            "RequireAnyClientCert" | "RequireClientCert" => Self::RequireAny,
            "VerifyClientCertIfGiven" => Self::VerifyIfGiven,
            "RequireAndVerifyClientCert" => Self::RequireAndVerify,
            _ => bail!(
                "client_auth_type: {name:?} is none of NoClientCert, RequestClientCert, RequireAnyClientCert, \
                 VerifyClientCertIfGiven and RequireAndVerifyClientCert"
            ),
        })
    }

    /// The check of a client's chain, where there is one, against these authorities.
    fn chain(
        self,
        authorities: Option<&str>,
        provider: &Arc<CryptoProvider>,
    ) -> anyhow::Result<Option<Arc<dyn ClientCertVerifier>>> {
        if !matches!(self, Self::VerifyIfGiven | Self::RequireAndVerify) {
            return Ok(None);
        }
        let pem = authorities.context(
            "client_auth_type needs client_ca or client_ca_file, the authority of the clients' certificates",
        )?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates("client_ca", pem)? {
            roots
                .add(certificate)
                .map_err(|error| anyhow!("client_ca: {error}"))?;
        }
        let check = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(provider));
        Ok(Some(check.build()?))
    }
}

/// The chain's check, where there is one, and then the allowed names.
#[derive(Debug)]
struct Verifier {
    chain: Option<Arc<dyn ClientCertVerifier>>,
    mandatory: bool,
    allowed: Vec<String>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain
            .as_ref()
            .map_or(&[], |chain| chain.root_hint_subjects())
    }

    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if let Some(chain) = &self.chain {
            chain.verify_client_cert(end_entity, intermediates, now)?;
        }
        if !self.allowed.is_empty() {
            let names = names(end_entity).map_err(|_| rustls::CertificateError::BadEncoding)?;
            if !names.iter().any(|name| self.allowed.contains(name)) {
                return Err(rustls::CertificateError::ApplicationVerificationFailure.into());
            }
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The subject alternative names that Go's x509 knows: DNS, e-mail, IP and URI.
fn names(certificate: &[u8]) -> anyhow::Result<Vec<String>> {
    let certificate = Certificate::from_der(certificate)?;
    let Some((_, SubjectAltName(names))) = certificate.tbs_certificate().get_extension()? else {
        return Ok(Vec::new());
    };
    let text = |name: &GeneralName| match name {
        GeneralName::DnsName(name) | GeneralName::Rfc822Name(name) => Some(name.to_string()),
        GeneralName::UniformResourceIdentifier(uri) => Some(uri.to_string()),
        GeneralName::IpAddress(octets) => {
            let octets = octets.as_bytes();
            let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
            let address = v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from));
            address.ok().map(|address| address.to_string())
        }
        _ => None,
    };
    Ok(names.iter().filter_map(text).collect())
}
