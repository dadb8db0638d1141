//! TLS of a port: which listener a client asks for, and what it is shown.

use leeward_identity::edge::{Certificates, Oldest, Pair, Slot, choose, server_config};
use leeward_policy::model::{GatewayTls, HostMatch, TlsVersion};
use leeward_policy::{ListenerView, Name, PortView};
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;

/// TLS of the listeners of one port. Clones share what clients may come back by, such as sessions.
#[derive(Clone, Debug)]
pub struct PortTls {
    listeners: Vec<TlsListener>,
    /// How QUIC is accepted, where a listener takes HTTP/3.
    http3: Option<Arc<ServerConfig>>,
}

/// TLS of one listener.
#[derive(Clone, Debug)]
pub(super) struct TlsListener {
    id: Arc<str>,
    hostname: HostMatch,
    slots: Arc<[Arc<Slot>]>,
    config: Arc<ServerConfig>,
    has_http3: bool,
    pub(super) head: u32,
    pub(super) idle: Duration,
    /// Proxies in front are believed.
    pub(super) of_many: bool,
}

/// What a handshake has settled.
#[derive(Debug)]
pub(super) struct Secure {
    /// The listener that it was for.
    listener: Arc<str>,
    /// The host that the client asked for, if it said one; lower case.
    asked: Option<Box<str>>,
    /// The certificate that it was shown.
    shown: Arc<Pair>,
    pub(super) has_http3: bool,
}

impl PortTls {
    /// What is spoken at a port; and for each listener of which something is wrong its position and what. One whose clients'
    /// roots can't be had is left out: nobody gets in there.
    pub fn new(port: &PortView, certificates: &Certificates) -> (Self, Vec<(usize, String)>) {
        let mut problems = Vec::new();
        let mut listeners: Vec<TlsListener> = Vec::new();
        let mut quic: Option<&GatewayTls> = None;
        for (i, view) in port.listeners.iter().enumerate() {
            let Some(tls) = view.spec.tls() else { continue };
            match TlsListener::new(view, tls, certificates) {
                Ok(listener) => {
                    quic = quic.or_else(|| listener.has_http3.then_some(tls));
                    listeners.push(listener);
                }
                Err(why) => problems.push((i, why)),
            }
        }
        let resolver = || {
            ByHost(
                listeners
                    .iter()
                    .filter(|listener| listener.has_http3)
                    .cloned()
                    .collect(),
            )
        };
        // Listeners of one port that take HTTP/3 have the same roots.
        let http3 = quic.and_then(|tls| {
            let roots = roots(tls, certificates).ok()?;
            let config = server_config(Arc::new(resolver()), Oldest::Tls13, roots, &[leeward_h3::ALPN]);
            config.ok()
        });
        (Self { listeners, http3 }, problems)
    }

    /// Whether anybody can come by HTTP/3: a listener takes it, and has what it asks of its clients.
    pub const fn takes_http3(&self) -> bool {
        self.http3.is_some()
    }

    /// How QUIC is accepted.
    pub(super) fn http3(&self) -> Option<&Arc<ServerConfig>> {
        self.http3.as_ref()
    }

    /// The listener for a client that asks for `host`, and what it is shown.
    pub(super) fn listener(&self, host: Option<&str>, by_http3: bool) -> Option<(&TlsListener, Secure)> {
        let usable = self
            .listeners
            .iter()
            .filter(|listener| !by_http3 || listener.has_http3);
        let listener = closest(usable, host)?;
        let secure = Secure {
            listener: Arc::clone(&listener.id),
            asked: host.map(Box::from),
            shown: choose(&listener.slots, host)?,
            has_http3: listener.has_http3,
        };
        Some((listener, secure))
    }
}

/// The listener whose hostname fits a host best; where none does, or none is said, the one for every host, or the first: a
/// client is to hear that its request is misdirected, and not to see a connection that fails.
fn closest<'l>(
    listeners: impl Iterator<Item = &'l TlsListener> + Clone,
    host: Option<&str>,
) -> Option<&'l TlsListener> {
    let all = listeners.map(|listener| (&listener.hostname, listener));
    host.and_then(|host| HostMatch::closest(all.clone(), host))
        .or_else(|| HostMatch::default_of(all))
}

impl TlsListener {
    fn new(view: &ListenerView, tls: &GatewayTls, certificates: &Certificates) -> Result<Self, String> {
        let slots: Arc<[_]> = tls
            .certificates
            .iter()
            .map(|name| certificates.slot(name.as_str()))
            .collect();
        let oldest = match tls.min_version {
            TlsVersion::Tls12 => Oldest::Tls12,
            TlsVersion::Tls13 => Oldest::Tls13,
        };
        let roots = roots(tls, certificates)?;
        let resolver = Arc::new(OfListener(Arc::clone(&slots)));
        let config = server_config(resolver, oldest, roots, &[b"h2", b"http/1.1"])
            .map_err(|error| format!("tls: {error}"))?;
        Ok(Self {
            id: Arc::clone(&view.id),
            hostname: view.spec.hostname.clone(),
            slots,
            config,
            has_http3: view.spec.has_http3(),
            head: view.spec.limits.max_header_bytes,
            idle: view.spec.limits.idle_timeout,
            of_many: view.trusted_hops > 0,
        })
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

fn roots(
    tls: &GatewayTls,
    certificates: &Certificates,
) -> Result<Option<Arc<tokio_rustls::rustls::RootCertStore>>, String> {
    let Some(names) = &tls.client_roots else {
        return Ok(None);
    };
    let roots = certificates.roots(names.iter().map(Name::as_str));
    roots
        .map(Some)
        .map_err(|why| format!("tls.clientValidation.caCertificateRefs: {why}"))
}

impl Secure {
    /// Whether a request for a host may come on the connection: it is for the same listener, and for the host that was asked
    /// for in the handshake or one that the same certificate stands for (RFC 9113 §9.1.1).
    pub(super) fn agrees(&self, listener: &ListenerView, host: &str) -> bool {
        let same_host = |asked: &str| asked == host || self.shown.covers(host);
        self.listener == listener.id && self.asked.as_deref().is_none_or(same_host)
    }
}

/// The certificates of one listener.
struct OfListener(Arc<[Arc<Slot>]>);

/// Those of several, each for its hosts.
struct ByHost(Vec<TlsListener>);

fn host_of<'h>(hello: &'h ClientHello<'_>) -> Option<Cow<'h, str>> {
    hello.server_name().map(crate::route::lower_case)
}

impl ResolvesServerCert for OfListener {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        choose(&self.0, host_of(&hello).as_deref()).map(|pair| pair.key())
    }
}

impl ResolvesServerCert for ByHost {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let host = host_of(&hello);
        let listener = closest(self.0.iter(), host.as_deref())?;
        choose(&listener.slots, host.as_deref()).map(|pair| pair.key())
    }
}

impl fmt::Debug for OfListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OfListener").finish_non_exhaustive()
    }
}

impl fmt::Debug for ByHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByHost").finish_non_exhaustive()
    }
}
