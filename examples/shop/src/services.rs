//! What each service answers.

use crate::book::{Book, Refused};
use crate::client::Mesh;
use bytes::Bytes;
use clap::ValueEnum;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The services of the shop.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Service {
    /// Composes pages out of the others' answers.
    Frontend,
    /// What there is, and what it costs.
    Catalog,
    /// What else one might like.
    Recommendations,
    /// Takes orders.
    Checkout,
    /// Charges for orders, once for each Idempotency-Key.
    Payment,
}

/// One instance of a service.
#[derive(Debug)]
pub(crate) struct Shop {
    pub(crate) service: Service,
    pub(crate) zone: String,
    pub(crate) instance: String,
    pub(crate) mesh: Mesh,
    /// Payment's.
    pub(crate) book: Option<Arc<Book>>,
    /// Requests that it was there for, those about itself left out.
    pub(crate) calls: AtomicU64,
}

/// What is for sale: name and price in cents.
const ITEMS: [(&str, u32); 6] = [
    ("tea", 450),
    ("lamp", 3900),
    ("rope", 1200),
    ("soap", 390),
    ("kettle", 2900),
    ("compass", 5400),
];
/// Largest order that is read, in bytes.
const MAX_ORDER: usize = 64 << 10;
/// Fields that go on to whoever is called: the trace, and who the customer is.
const PASSED: [&str; 3] = ["traceparent", "tracestate", "x-customer"];
/// By which payment knows an order that it has seen before. The customer makes it.
const KEY: &str = "idempotency-key";

/// An answer, or why there is none.
type Answered = Result<(StatusCode, Value), (StatusCode, String)>;

/// What a customer sends.
#[derive(Deserialize)]
struct Order {
    item: String,
    #[serde(default = "one")]
    quantity: u32,
}

/// What checkout asks of payment.
#[derive(Deserialize)]
struct Charge {
    cents: u64,
}

const fn one() -> u32 {
    1
}

impl Shop {
    /// Answers a request.
    pub(crate) async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let passed = pick(request.headers(), &PASSED);
        let path = request.uri().path();
        if !matches!(path, "/healthz" | "/calls") {
            self.calls.fetch_add(1, Ordering::Relaxed);
        }
        let answered = match (self.service, request.method(), path) {
            (_, &Method::GET, "/healthz") => ok(json!({"ok": true})),
            (_, &Method::GET, "/calls") => ok(json!({"calls": self.calls.load(Ordering::Relaxed)})),
            (Service::Frontend, &Method::GET, "/feed") => self.feed(&passed).await,
            (Service::Frontend, &Method::POST, "/orders") => self.pass_order(request, &passed).await,
            (Service::Catalog, &Method::GET, "/items") => ok(json!({"items": items()})),
            (Service::Recommendations, &Method::GET, "/recommendations") => {
                ok(json!({"items": ["compass", "tea", "lamp"], "source": "personal"}))
            }
            (Service::Checkout, &Method::POST, "/orders") => self.order(request, &passed).await,
            (Service::Payment, &Method::POST, "/charges") => self.charge(request).await,
            (Service::Payment, &Method::GET, "/charges") => self.charges(),
            _ => Err((StatusCode::NOT_FOUND, "there is nothing here".to_owned())),
        };
        let (status, mut body) = match answered {
            Ok(answer) => answer,
            Err((status, error)) => (status, json!({"error": error})),
        };
        if let Value::Object(body) = &mut body {
            body.insert("zone".to_owned(), json!(self.zone));
            body.insert("instance".to_owned(), json!(self.instance));
        }
        let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
        *response.status_mut() = status;
        let json = header::HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        response
    }

    /// The page: what there is, and what else one might like. A page without a catalogue is none.
    async fn feed(&self, passed: &HeaderMap) -> Answered {
        let (catalog, recommendations) = tokio::join!(
            self.get("catalog.shop", "/items", passed),
            self.get("recommendations.shop", "/recommendations", passed),
        );
        let (catalog, recommendations) = (catalog?, recommendations?);
        let fallbacks = fallbacks(&[&catalog, &recommendations]);
        ok(json!({
            "catalog": catalog.body, "recommendations": recommendations.body,
            "degraded": !fallbacks.is_empty(), "fallbacks": fallbacks,
        }))
    }

    async fn pass_order(&self, request: Request<Incoming>, passed: &HeaderMap) -> Answered {
        let key = pick(request.headers(), &[KEY]);
        let call = post("/orders", &key, read(request).await?)?;
        let part = self.part("checkout.shop", call, passed).await?;
        let fallbacks = fallbacks(&[&part]);
        let body = json!({"order": part.body, "degraded": !fallbacks.is_empty(), "fallbacks": fallbacks});
        Ok((part.status, body))
    }

    /// Takes an order, and has it paid for: now, or, where the mesh has taken the charge in, later.
    async fn order(&self, request: Request<Incoming>, passed: &HeaderMap) -> Answered {
        let key = pick(request.headers(), &[KEY]);
        let order: Order = serde_json::from_slice(&read(request).await?)
            .map_err(|error| (StatusCode::BAD_REQUEST, format!("not an order: {error}")))?;
        let catalog = self.get("catalog.shop", "/items", passed).await?;
        let price = catalog
            .body
            .get("items")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .find(|item| item.get("name").and_then(Value::as_str) == Some(&order.item))
            .and_then(|item| item.get("cents").and_then(Value::as_u64))
            .ok_or_else(|| (StatusCode::NOT_FOUND, format!("there is no {:?}", order.item)))?;
        let total = price.saturating_mul(order.quantity.into());
        let call = post("/charges", &key, json!({"cents": total}).to_string().into())?;
        let payment = self.part("payment.shop", call, passed).await?;
        let (status, said) = match payment.status {
            StatusCode::ACCEPTED => (StatusCode::ACCEPTED, "accepted, payment pending"),
            _ => (StatusCode::OK, "paid"),
        };
        let body = json!({
            "item": order.item, "quantity": order.quantity, "total_cents": total, "state": said,
            "fallbacks": fallbacks(&[&catalog, &payment]),
        });
        Ok((status, body))
    }

    /// Charges, or says that it has done so before.
    async fn charge(&self, request: Request<Incoming>) -> Answered {
        let key = request.headers().get(KEY).and_then(|key| key.to_str().ok());
        let key = key.unwrap_or_default().to_owned();
        let charge: Charge = serde_json::from_slice(&read(request).await?)
            .map_err(|error| (StatusCode::BAD_REQUEST, format!("not a charge: {error}")))?;
        let book = Arc::clone(self.book()?);
        // It waits for the disk.
        let charged = tokio::task::spawn_blocking(move || book.charge(&key))
            .await
            .map_err(internal)?;
        match charged {
            Ok(new) => ok(json!({"cents": charge.cents, "charged": new})),
            Err(Refused::Key) => Err((
                StatusCode::BAD_REQUEST,
                format!("{KEY}: want 1 to 255 visible ASCII characters, without a space"),
            )),
            Err(Refused::Full) => Err((StatusCode::INSUFFICIENT_STORAGE, "the book is full".to_owned())),
            Err(Refused::Io(error)) => Err(internal(error)),
        }
    }

    fn charges(&self) -> Answered {
        let counts = self.book()?.counts();
        ok(json!({"keys": counts.keys, "charges": counts.charges, "calls": counts.calls}))
    }

    fn book(&self) -> Result<&Arc<Book>, (StatusCode, String)> {
        self.book.as_ref().ok_or_else(|| internal("there is no book"))
    }

    async fn get(
        &self,
        host: &'static str,
        path: &'static str,
        passed: &HeaderMap,
    ) -> Result<Part, (StatusCode, String)> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = path.parse().map_err(internal)?;
        self.part(host, request, passed).await
    }

    /// One part of a page: another service's answer.
    async fn part(
        &self,
        host: &'static str,
        request: Request<Full<Bytes>>,
        passed: &HeaderMap,
    ) -> Result<Part, (StatusCode, String)> {
        let failed = |what: String| (StatusCode::BAD_GATEWAY, format!("{host}: {what}"));
        let response = self
            .mesh
            .call(request, host, passed)
            .await
            .map_err(|error| failed(format!("{error:#}")))?;
        if !response.status().is_success() {
            return Err(failed(response.status().to_string()));
        }
        let body = serde_json::from_slice(response.body()).map_err(|error| failed(error.to_string()))?;
        let fallback = response.headers().get("leeward-degraded");
        Ok(Part {
            status: response.status(),
            body,
            fallback: fallback
                .and_then(|rung| rung.to_str().ok())
                .map(ToOwned::to_owned),
        })
    }
}

struct Part {
    status: StatusCode,
    body: Value,
    /// The fallback that it is of.
    fallback: Option<String>,
}

/// The fallbacks that parts are of, those that the parts say themselves included.
fn fallbacks(parts: &[&Part]) -> Vec<String> {
    let of = |part: &&Part| {
        let own = part.fallback.clone();
        let said = part.body.get("fallbacks").and_then(Value::as_array).into_iter();
        let said = said.flatten().filter_map(Value::as_str).map(ToOwned::to_owned);
        own.into_iter().chain(said).collect::<Vec<_>>()
    };
    parts.iter().flat_map(of).collect()
}

#[expect(clippy::unnecessary_wraps, reason = "the form of every answer")]
fn ok(body: Value) -> Answered {
    Ok((StatusCode::OK, body))
}

/// The fields of these names.
fn pick(headers: &HeaderMap, names: &[&'static str]) -> HeaderMap {
    let mut picked = HeaderMap::new();
    for name in names {
        if let Some(value) = headers.get(*name) {
            picked.insert(*name, value.clone());
        }
    }
    picked
}

fn items() -> Vec<Value> {
    ITEMS
        .iter()
        .map(|(name, cents)| json!({"name": name, "cents": cents}))
        .collect()
}

async fn read(request: Request<Incoming>) -> Result<Bytes, (StatusCode, String)> {
    let body = Limited::new(request.into_body(), MAX_ORDER).collect().await;
    body.map(http_body_util::Collected::to_bytes).map_err(|error| {
        (
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the order can't be read: {error}"),
        )
    })
}

fn post(
    path: &'static str,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<Request<Full<Bytes>>, (StatusCode, String)> {
    let mut request = Request::post(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(internal)?;
    request.headers_mut().extend(headers.clone());
    Ok(request)
}

fn internal(error: impl std::fmt::Display) -> (StatusCode, String) {
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}
