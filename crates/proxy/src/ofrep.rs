//! Feature flags for the node's workloads, by the OpenFeature Remote Evaluation Protocol 0.2
//! (<https://github.com/open-feature/protocol>): those that requests are judged by.

use crate::drain::Phase;
use crate::resilience::wall;
use crate::side::Side;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use leeward_config::Live;
use leeward_flags::{ErrorCode, FlagSet};
use leeward_policy::{FlagsInForce, Levels, Resolved, Snapshot};
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};
use std::hash::Hasher;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use twox_hash::XxHash64;

/// Connections at once; more wait. Every workload of a node may keep one.
const MAX_CONNECTIONS: usize = 1024;
/// The longest body of a request, in bytes.
const MAX_BODY: usize = 64 << 10;
/// How long a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Where all flags are evaluated, and with a key behind it one of them.
const PATH: &str = "/ofrep/v1/evaluate/flags";
/// Flags that are evaluated before others have their turn.
const BATCH: usize = 256;
/// Under which name an answer's metadata tell of the level of degradation that forces a flag.
const DEGRADATION: &str = "leeward.degradation";

/// Answers until dropped, or until a successor has the listener.
pub(crate) async fn serve(listener: Side, live: Live, phases: watch::Receiver<Phase>) {
    let answer = move |request| answer(live.clone(), request);
    listener.serve("OFREP", MAX_CONNECTIONS, phases, answer).await;
}

/// The flags of one moment.
struct Flags {
    levels: Arc<Levels>,
    file: Option<Arc<FlagSet>>,
    policy: Arc<Snapshot>,
}

impl Flags {
    fn of(live: &Live) -> Self {
        Self {
            levels: live.levels().load_full(),
            file: live.file_flags().load_full(),
            policy: live.snapshot().load_full(),
        }
    }

    fn in_force(&self) -> FlagsInForce<'_> {
        FlagsInForce {
            levels: &self.levels,
            file: self.file.as_deref(),
            policy: self.policy.flags(),
        }
    }

    /// What the sets say of themselves, the file's before policy's.
    fn metadata(&self) -> Map<String, Value> {
        let mut metadata = self.policy.flags().metadata().clone();
        if let Some(file) = &self.file {
            metadata.extend(file.metadata().clone());
        }
        metadata
    }
}

async fn answer(live: Live, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let key = match head.uri.path().strip_prefix(PATH) {
        Some("" | "/") => Ok(None),
        Some(rest) => rest.strip_prefix('/').map(Some).ok_or(()),
        None => Err(()),
    };
    let Ok(key) = key else {
        return failure(
            StatusCode::NOT_FOUND,
            &format!("there are POST {PATH} and {PATH}/KEY"),
        );
    };
    if head.method != Method::POST {
        let mut response = failure(StatusCode::METHOD_NOT_ALLOWED, "want POST");
        response
            .headers_mut()
            .insert(header::ALLOW, HeaderValue::from_static("POST"));
        return response;
    }
    let Ok(key) = key.map(|key| percent_decode_str(key).decode_utf8()).transpose() else {
        return failure(StatusCode::BAD_REQUEST, "the flag's key is no UTF-8");
    };
    let body = match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            return failure(
                StatusCode::PAYLOAD_TOO_LARGE,
                &format!("the body is longer than {MAX_BODY} bytes"),
            );
        }
        Ok(Err(error)) => return failure(StatusCode::BAD_REQUEST, &format!("the body broke off: {error}")),
        Err(_) => return failure(StatusCode::REQUEST_TIMEOUT, "the body took too long"),
    };
    let context = match context(&body) {
        Ok(context) => context,
        Err((code, why)) => {
            return json(
                StatusCode::BAD_REQUEST,
                &error(key.as_deref(), code, &why, &Map::new()),
            );
        }
    };
    let flags = Flags::of(&live);
    match key {
        Some(key) => one(&flags, &key, &context),
        None => all(&flags, &context, &head.headers).await,
    }
}

/// The context in a request's body. Without a body, or without one in it, it is empty.
fn context(body: &[u8]) -> Result<Value, (ErrorCode, String)> {
    if body.is_empty() {
        return Ok(Value::Null);
    }
    let body: Value = serde_json::from_slice(body)
        .map_err(|error| (ErrorCode::ParseError, format!("the body is no JSON: {error}")))?;
    let Value::Object(mut body) = body else {
        let why = "the body is no object, such as {\"context\": {}}";
        return Err((ErrorCode::ParseError, why.to_owned()));
    };
    match body.remove("context") {
        None | Some(Value::Null) => Ok(Value::Null),
        Some(context @ Value::Object(_)) => Ok(context),
        Some(Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
            Err((ErrorCode::InvalidContext, "context: is no object".to_owned()))
        }
    }
}

fn one(flags: &Flags, key: &str, context: &Value) -> Response<Full<Bytes>> {
    let resolved = flags.in_force().evaluate_json(key, context, wall());
    let status = match resolved.evaluation.error {
        None => StatusCode::OK,
        Some(ErrorCode::FlagNotFound) => StatusCode::NOT_FOUND,
        Some(_) => StatusCode::BAD_REQUEST,
    };
    json(status, &result(flags, key, &resolved))
}

/// All flags, unless they are for this context what the client has already. That is told by the answer itself, so
/// that it changes exactly if a result does.
async fn all(flags: &Flags, context: &Value, headers: &HeaderMap) -> Response<Full<Bytes>> {
    let wall = wall();
    let mut results = Vec::new();
    for (at, key) in flags.in_force().keys().into_iter().enumerate() {
        if at % BATCH == BATCH - 1 {
            tokio::task::yield_now().await;
        }
        let resolved = flags.in_force().evaluate_json(key, context, wall);
        results.push(result(flags, key, &resolved));
    }
    let answer = json!({"flags": results, "metadata": flags.metadata()}).to_string();
    let mut hasher = XxHash64::with_seed(0);
    hasher.write(answer.as_bytes());
    let tag = format!("\"{:016x}\"", hasher.finish());
    let mut response = if has(headers, &tag) {
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response
    } else {
        with_json(StatusCode::OK, answer)
    };
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

/// Whether a client has the answer with this tag, RFC 9110, 13.1.2.
fn has(headers: &HeaderMap, tag: &str) -> bool {
    let fields = headers.get_all(header::IF_NONE_MATCH).into_iter();
    let known = fields
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(','));
    known
        .map(str::trim)
        .any(|known| known == "*" || known.trim_start_matches("W/") == tag)
}

/// A flag's part of an answer. Without a value the client has a default of its own, as flagd has it.
fn result(flags: &Flags, key: &str, resolved: &Resolved<'_>) -> Value {
    let mut metadata = flags
        .in_force()
        .get(key)
        .map_or_else(Map::new, |flag| flag.metadata().clone());
    if let Some(by) = resolved.by {
        metadata.insert(DEGRADATION.to_owned(), Value::from(&**by));
    }
    let evaluation = &resolved.evaluation;
    if let Some(code) = evaluation.error {
        let why = match code {
            ErrorCode::FlagNotFound => format!("there is no flag `{key}`"),
            ErrorCode::General => format!("the targeting of flag `{key}` chose what is none of its variants"),
            ErrorCode::ParseError => {
                format!("the targeting of flag `{key}` can't be evaluated for this context")
            }
            ErrorCode::InvalidContext => "context: is no object".to_owned(),
            ErrorCode::TypeMismatch | ErrorCode::TargetingKeyMissing => {
                format!("flag `{key}` can't be evaluated for this context")
            }
        };
        return error(Some(key), code, &why, &metadata);
    }
    let mut result = Map::new();
    result.insert("key".to_owned(), Value::from(key));
    result.insert("reason".to_owned(), Value::from(evaluation.reason.as_str()));
    if let Some(variant) = evaluation.variant {
        result.insert("variant".to_owned(), Value::from(variant));
    }
    if let Some(value) = evaluation.value {
        result.insert("value".to_owned(), value.clone());
    }
    result.insert("metadata".to_owned(), Value::Object(metadata));
    Value::Object(result)
}

fn error(key: Option<&str>, code: ErrorCode, why: &str, metadata: &Map<String, Value>) -> Value {
    let mut error = json!({"errorCode": code.as_str(), "errorDetails": why});
    if let (Some(key), Some(error)) = (key, error.as_object_mut()) {
        error.insert("key".to_owned(), Value::from(key));
        error.insert("metadata".to_owned(), Value::Object(metadata.clone()));
    }
    error
}

/// What is wrong with a request that asks for no flag.
fn failure(status: StatusCode, why: &str) -> Response<Full<Bytes>> {
    json(status, &json!({"errorDetails": why}))
}

fn json(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    with_json(status, value.to_string())
}

fn with_json(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use leeward_policy::model::{DegradationLevel, DegradationPolicy};
    use leeward_policy::{Name, Viewer};

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    /// A file's flags, with a level that holds and forces `reco` to `off`.
    fn degraded() -> Flags {
        let document = r#"{"flags": {
            "reco": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "on",
                "targeting": {"if": [{"==": [{"var": "tier"}, "gold"]}, "on", "nothing"]}, "metadata": {"team": "feed"}},
            "other": {"state": "ENABLED", "variants": {"on": true}, "defaultVariant": "on"}
        }, "metadata": {"flagSetId": "shop"}}"#;
        let level = |text, forced: &[(&str, &str)]| DegradationLevel {
            name: name(text),
            flags: forced.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            shed_below: None,
        };
        let policy = DegradationPolicy {
            levels: vec![level("normal", &[]), level("core-only", &[("reco", "off")])],
            routes: Vec::new(),
            triggers: Vec::new(),
        };
        Flags {
            levels: Arc::new(Levels::new([(&Arc::from("shop"), &policy, 1)])),
            file: Some(Arc::new(FlagSet::parse(document).unwrap())),
            policy: Arc::new(Snapshot::empty(Viewer {
                zone: name("a"),
                proxy: name("a1"),
            })),
        }
    }

    async fn parts(response: Response<Full<Bytes>>) -> (u16, Value, HeaderMap) {
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        (head.status.as_u16(), body, head.headers)
    }

    #[tokio::test]
    async fn a_level_that_forces_a_flag_is_named() {
        let flags = degraded();
        let (status, body, _) = parts(one(&flags, "reco", &Value::Null)).await;
        let metadata = json!({"flagSetId": "shop", "team": "feed", "leeward.degradation": "shop/core-only"});
        let forced = json!({"key": "reco", "reason": "STATIC", "variant": "off", "value": false, "metadata": metadata});
        assert_eq!((status, body), (200, forced));
        let (_, body, _) = parts(one(&flags, "other", &Value::Null)).await;
        assert_eq!(body.get("metadata"), Some(&json!({"flagSetId": "shop"})));
    }

    #[tokio::test]
    async fn a_change_of_level_is_another_answer() {
        let mut flags = degraded();
        let gold = json!({"tier": "gold"});
        let tag = async |flags: &Flags, known: Option<&HeaderValue>| {
            let headers = known
                .map(|tag| (header::IF_NONE_MATCH, tag.clone()))
                .into_iter()
                .collect();
            let (status, _, headers) = parts(all(flags, &gold, &headers).await).await;
            (status, headers.get(header::ETAG).unwrap().clone())
        };
        let (status, first) = tag(&flags, None).await;
        assert_eq!(status, 200);
        assert_eq!(tag(&flags, Some(&first)).await, (304, first.clone()));
        flags.levels = Arc::default();
        let (status, second) = tag(&flags, Some(&first)).await;
        assert_eq!(status, 200);
        assert_ne!(first, second);
    }

    #[tokio::test]
    async fn a_flag_that_fails_is_told_among_the_others() {
        let mut flags = degraded();
        flags.levels = Arc::default();
        let (status, body, _) = parts(one(&flags, "reco", &Value::Null)).await;
        assert_eq!((status, body.get("errorCode")), (400, Some(&json!("GENERAL"))));
        let (status, body, _) = parts(all(&flags, &Value::Null, &HeaderMap::new()).await).await;
        let results = body.get("flags").and_then(Value::as_array).unwrap();
        assert_eq!((status, results.len()), (200, 2));
        assert_eq!(results[0].get("value"), Some(&json!(true)));
        assert_eq!(results[1].get("errorCode"), Some(&json!("GENERAL")));
        assert_eq!(body.get("metadata"), Some(&json!({"flagSetId": "shop"})));
    }

    #[test]
    fn a_tag_is_known_in_any_of_a_field_s_forms() {
        let of = |text: &'static str| {
            HeaderMap::from_iter([(header::IF_NONE_MATCH, HeaderValue::from_static(text))])
        };
        for text in ["\"a\"", "*", "\"b\", \"a\"", "W/\"a\""] {
            assert!(has(&of(text), "\"a\""), "{text}");
        }
        for text in ["\"b\"", "", "a"] {
            assert!(!has(&of(text), "\"a\""), "{text}");
        }
        assert!(!has(&HeaderMap::new(), "\"a\""));
    }
}
