//! What each service answers.

use crate::client::Mesh;
use bytes::Bytes;
use clap::ValueEnum;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};

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
}

/// One instance of a service.
#[derive(Debug)]
pub(crate) struct Shop {
    pub(crate) service: Service,
    pub(crate) zone: String,
    pub(crate) instance: String,
    pub(crate) mesh: Mesh,
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
/// Fields that make a trace go on.
const TRACE: [&str; 2] = ["traceparent", "tracestate"];

/// What a customer sends.
#[derive(Deserialize)]
struct Order {
    item: String,
    #[serde(default = "one")]
    quantity: u32,
}

const fn one() -> u32 {
    1
}

impl Shop {
    /// Answers a request.
    pub(crate) async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let mut trace = HeaderMap::new();
        for name in TRACE {
            if let Some(value) = request.headers().get(name) {
                trace.insert(name, value.clone());
            }
        }
        let answered = match (self.service, request.method(), request.uri().path()) {
            (_, &Method::GET, "/healthz") => Ok(json!({"ok": true})),
            (Service::Frontend, &Method::GET, "/feed") => self.feed(&trace).await,
            (Service::Frontend, &Method::POST, "/orders") => self.pass_order(request, &trace).await,
            (Service::Catalog, &Method::GET, "/items") => Ok(json!({"items": items()})),
            (Service::Recommendations, &Method::GET, "/recommendations") => {
                Ok(json!({"items": ["compass", "tea", "lamp"], "source": "personal"}))
            }
            (Service::Checkout, &Method::POST, "/orders") => self.order(request, &trace).await,
            _ => Err((StatusCode::NOT_FOUND, "there is nothing here".to_owned())),
        };
        let (status, mut body) = match answered {
            Ok(body) => (StatusCode::OK, body),
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
    async fn feed(&self, trace: &HeaderMap) -> Result<Value, (StatusCode, String)> {
        let (catalog, recommendations) = tokio::join!(
            self.get("catalog.shop", "/items", trace),
            self.get("recommendations.shop", "/recommendations", trace),
        );
        let (catalog, recommendations) = (catalog?, recommendations?);
        let degraded = catalog.degraded || recommendations.degraded;
        Ok(json!({"catalog": catalog.body, "recommendations": recommendations.body, "degraded": degraded}))
    }

    async fn pass_order(
        &self,
        request: Request<Incoming>,
        trace: &HeaderMap,
    ) -> Result<Value, (StatusCode, String)> {
        let order = read(request).await?;
        let call = post("/orders", order)?;
        let part = self.part("checkout.shop", call, trace).await?;
        Ok(json!({"order": part.body, "degraded": part.degraded}))
    }

    async fn order(
        &self,
        request: Request<Incoming>,
        trace: &HeaderMap,
    ) -> Result<Value, (StatusCode, String)> {
        let order: Order = serde_json::from_slice(&read(request).await?)
            .map_err(|error| (StatusCode::BAD_REQUEST, format!("not an order: {error}")))?;
        let catalog = self.get("catalog.shop", "/items", trace).await?;
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
        Ok(json!({"item": order.item, "quantity": order.quantity, "total_cents": total}))
    }

    async fn get(
        &self,
        host: &'static str,
        path: &'static str,
        trace: &HeaderMap,
    ) -> Result<Part, (StatusCode, String)> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = path.parse().map_err(internal)?;
        self.part(host, request, trace).await
    }

    /// One part of a page: another service's answer.
    async fn part(
        &self,
        host: &'static str,
        request: Request<Full<Bytes>>,
        trace: &HeaderMap,
    ) -> Result<Part, (StatusCode, String)> {
        let failed = |what: String| (StatusCode::BAD_GATEWAY, format!("{host}: {what}"));
        let response = self
            .mesh
            .call(request, host, trace)
            .await
            .map_err(|error| failed(format!("{error:#}")))?;
        if !response.status().is_success() {
            return Err(failed(response.status().to_string()));
        }
        let body = serde_json::from_slice(response.body()).map_err(|error| failed(error.to_string()))?;
        Ok(Part {
            body,
            degraded: response.headers().contains_key("leeward-degraded"),
        })
    }
}

struct Part {
    body: Value,
    degraded: bool,
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

fn post(path: &'static str, body: Bytes) -> Result<Request<Full<Bytes>>, (StatusCode, String)> {
    Request::post(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(internal)
}

fn internal(error: impl std::fmt::Display) -> (StatusCode, String) {
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}
