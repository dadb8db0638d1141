//! Users of both zones: a steady stream of them, each wanting a page.

use super::summary::{Counts, Got};
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// Users in each zone.
const USERS: usize = 5;
/// How often each wants something.
const PAUSE: Duration = Duration::from_millis(100);
/// Every so many wishes is an order in place of a page.
const ORDER_EVERY: usize = 10;
/// How long a user waits.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest page that is read, in bytes.
const MAX_PAGE: usize = 1 << 20;

/// What all users got.
#[derive(Debug)]
pub(crate) struct Traffic {
    phase: AtomicUsize,
    stopped: AtomicBool,
    counts: Mutex<Vec<Counts>>,
    first_failure: Mutex<Option<String>>,
}

/// What one user got.
enum Answer {
    /// What it wanted, or less.
    Page(Page),
    /// A word that there is none now, since a level of degradation spares the shop such requests.
    Shed,
}

struct Page {
    order: Option<Order>,
    /// Where its catalogue came from; an order has none.
    from: Option<String>,
    /// The fallbacks that its parts are of.
    fallbacks: Vec<String>,
}

/// An order that was taken.
#[derive(Eq, PartialEq)]
enum Order {
    Paid,
    /// It is paid for when payment is back.
    Pending,
}

/// What one user wants.
struct Wish {
    /// Who wants it.
    customer: String,
    /// The key of an order; a page has none.
    order: Option<String>,
}

impl Traffic {
    pub(crate) fn new(phases: usize) -> Self {
        Self {
            phase: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            counts: Mutex::new(vec![Counts::default(); phases]),
            first_failure: Mutex::default(),
        }
    }

    /// Sends users in, each to the proxy of their zone.
    pub(crate) fn start(self: &Arc<Self>, zones: Vec<(&'static str, SocketAddr)>) -> Vec<JoinHandle<()>> {
        let mut users = Vec::new();
        for (zone, proxy) in zones {
            for n in 0..USERS {
                let traffic = Arc::clone(self);
                users.push(tokio::spawn(async move { traffic.user(zone, proxy, n).await }));
            }
        }
        users
    }

    /// What is answered from now on counts for this phase.
    pub(crate) fn enter(&self, phase: usize) {
        self.phase.store(phase, Ordering::Relaxed);
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// What users got in a phase.
    pub(crate) fn counts(&self, phase: usize) -> Counts {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.get(phase).cloned().unwrap_or_default()
    }

    pub(crate) fn first_failure(&self) -> Option<String> {
        self.first_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    async fn user(&self, zone: &'static str, proxy: SocketAddr, n: usize) {
        let mut connection = None;
        // Not all at once.
        tokio::time::sleep(PAUSE * u32::try_from(n).unwrap_or(0) / u32::try_from(USERS).unwrap_or(1)).await;
        let mut ticks = tokio::time::interval(PAUSE);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut wishes = n;
        while !self.stopped.load(Ordering::Relaxed) {
            ticks.tick().await;
            let order = wishes.is_multiple_of(ORDER_EVERY);
            let wish = Wish {
                customer: format!("{zone}-{n}"),
                order: order.then(|| format!("order-{zone}-{n}-{wishes}")),
            };
            wishes += 1;
            let wish = tokio::time::timeout(PATIENCE, fulfil(&mut connection, proxy, wish)).await;
            let got = wish.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {PATIENCE:?}")));
            self.count(self.phase.load(Ordering::Relaxed), zone, got);
        }
    }

    fn count(&self, phase: usize, zone: &str, got: anyhow::Result<Answer>) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(counts) = counts.get_mut(phase) else {
            return;
        };
        let entry: &mut Got = counts.entry(zone.to_owned()).or_default();
        match got {
            Ok(Answer::Shed) => entry.shed += 1,
            Ok(Answer::Page(page)) => {
                if page.fallbacks.is_empty() {
                    entry.served += 1;
                } else {
                    entry.degraded += 1;
                }
                for fallback in page.fallbacks {
                    *entry.fallbacks.entry(fallback).or_default() += 1;
                }
                entry.orders += u64::from(page.order.is_some());
                entry.pending += u64::from(page.order == Some(Order::Pending));
                if let Some(from) = page.from {
                    *entry.from.entry(from).or_default() += 1;
                }
            }
            Err(error) => {
                entry.failed += 1;
                let mut first = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert_with(|| format!("a user in zone {zone}: {error:#}"));
            }
        }
    }
}

async fn fulfil(
    connection: &mut Option<SendRequest<Full<Bytes>>>,
    proxy: SocketAddr,
    wish: Wish,
) -> anyhow::Result<Answer> {
    let mut sender = match connection.take() {
        Some(sender) if !sender.is_closed() => sender,
        _ => {
            let stream = TcpStream::connect(proxy).await?;
            stream.set_nodelay(true)?;
            let (sender, serving) = handshake(TokioIo::new(stream)).await?;
            tokio::spawn(serving);
            sender
        }
    };
    sender.ready().await?;
    let (method, path, body) = match wish.order {
        Some(_) => (
            Method::POST,
            "/orders",
            Bytes::from_static(br#"{"item": "tea", "quantity": 2}"#),
        ),
        None => (Method::GET, "/feed", Bytes::new()),
    };
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "frontend.shop")
        .header("x-customer", wish.customer);
    if let Some(key) = &wish.order {
        request = request.header("idempotency-key", key);
    }
    let (parts, body) = sender
        .send_request(request.body(Full::new(body))?)
        .await?
        .into_parts();
    let body = Limited::new(body, MAX_PAGE)
        .collect()
        .await
        .map_err(anyhow::Error::from_boxed)?
        .to_bytes();
    if parts.headers.get(header::CONNECTION).is_none_or(|c| c != "close") {
        *connection = Some(sender);
    }
    if parts
        .headers
        .get("leeward-limit")
        .is_some_and(|limit| limit == "degradation.shedBelow")
    {
        return Ok(Answer::Shed);
    }
    let text = || String::from_utf8_lossy(&body).into_owned();
    anyhow::ensure!(parts.status.is_success(), "{} {path}: {}", parts.status, text());
    let page: Value = serde_json::from_slice(&body)?;
    let from = page
        .pointer("/catalog/zone")
        .and_then(Value::as_str)
        .map(ToOwned::to_owned);
    anyhow::ensure!(
        from.is_some() || wish.order.is_some(),
        "the page doesn't say where it is from: {}",
        text()
    );
    let fallbacks = page.get("fallbacks").and_then(Value::as_array).into_iter();
    let fallbacks = fallbacks.flatten().filter_map(Value::as_str);
    Ok(Answer::Page(Page {
        order: wish.order.map(|_| match parts.status {
            StatusCode::ACCEPTED => Order::Pending,
            _ => Order::Paid,
        }),
        from,
        fallbacks: fallbacks.map(ToOwned::to_owned).collect(),
    }))
}
