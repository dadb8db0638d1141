//! From a request over HTTP to the message that it stands for.

use super::routes::{BodyIs, Route};
use crate::policy::Refused;
use crate::refusal::{bad, status};
use http::header::CONTENT_TYPE;
use http::request::Parts;
use leeward_proto::{BadField, manifest, v1};
use percent_encoding::percent_decode_str;
use prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value};
use serde_json::{Map, Value as Json};
use tonic::Status;

/// Parameters of a query.
const MAX_PARAMETERS: usize = 64;

/// How a request's body becomes messages.
#[derive(Clone, Debug)]
pub(super) struct Question {
    input: MessageDescriptor,
    is_stream: bool,
    body: BodyIs,
    is_yaml: bool,
    /// What path and query say, as JSON.
    said: Map<String, Json>,
    /// The kind and name that the path says of the resource in the body.
    named: Option<(String, String)>,
}

impl Question {
    /// Of a route and the head of a request.
    ///
    /// # Errors
    ///
    /// `INVALID_ARGUMENT` names the parameter that is bad; `UNIMPLEMENTED` is about the type of the body.
    pub(super) fn new(route: &Route, parts: &Parts) -> Result<Self, Status> {
        let input = route.method.input();
        let mut said = Map::new();
        for (field, value) in &route.fields {
            put(&input, &mut said, field, value)?;
        }
        for (name, value) in parameters(parts.uri.query().unwrap_or_default())? {
            if Some(name.as_str()) != route.only_with {
                put(&input, &mut said, &name, &value)?;
            }
        }
        let content = parts
            .headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok());
        let content = content
            .unwrap_or_default()
            .split(';')
            .next()
            .unwrap_or_default()
            .trim();
        let is_manifest = matches!(route.body, BodyIs::Resource | BodyIs::Resources);
        // Whatever a page of another site can send without asking first is refused: a browser would add its user's
        // certificate.
        let is_yaml = match content.to_ascii_lowercase().as_str() {
            "application/json" => false,
            "application/x-ndjson" if route.method.is_client_streaming() => false,
            "application/yaml" | "application/x-yaml" | "text/yaml" if is_manifest => true,
            _ if route.body == BodyIs::Nothing => false,
            _ => {
                let also = if is_manifest { " or application/yaml" } else { "" };
                let shown: String = content.chars().take(80).collect();
                return Err(Status::unimplemented(format!(
                    "the content-type is {shown:?}; want application/json{also}"
                )));
            }
        };
        Ok(Self {
            input,
            is_stream: route.method.is_client_streaming(),
            body: route.body,
            is_yaml,
            said,
            named: route.named.clone(),
        })
    }

    /// Whether the body is many messages, each on a line.
    pub(super) const fn is_stream(&self) -> bool {
        self.is_stream
    }

    /// The message that a body stands for, or a line of one.
    pub(super) fn message(&self, text: &[u8]) -> Result<Vec<u8>, Status> {
        let message = match self.body {
            BodyIs::Nothing if text.is_empty() => self.said()?,
            BodyIs::Nothing => return Err(bad("body", "is there; this request has none".to_owned())),
            BodyIs::Message => {
                if let Some(name) = self.said.keys().next() {
                    return Err(bad(name, "stands in the query; want it in the body".to_owned()));
                }
                read(&self.input, text)?
            }
            BodyIs::Resource | BodyIs::Resources => {
                let mut message = self.said()?;
                let field = self.input.get_field_by_name("resources");
                let field = field.ok_or_else(|| Status::internal("the request takes no resources"))?;
                message.set_field(&field, Value::List(self.resources(&field, text)?));
                message
            }
        };
        Ok(message.encode_to_vec())
    }

    fn said(&self) -> Result<DynamicMessage, Status> {
        let said = Json::Object(self.said.clone());
        DynamicMessage::deserialize(self.input.clone(), said)
            .map_err(|error| bad("query", format!("can't be read: {error}")))
    }

    fn resources(&self, field: &FieldDescriptor, text: &[u8]) -> Result<Vec<Value>, Status> {
        let kind = field.kind();
        let of = kind
            .as_message()
            .ok_or_else(|| Status::internal("resources are no messages"))?;
        let mut all = Vec::new();
        for resource in self.wire(of, text)? {
            let message = DynamicMessage::decode(of.clone(), resource.encode_to_vec().as_slice());
            let message = message.map_err(|error| Status::internal(error.to_string()))?;
            all.push(Value::Message(message));
        }
        Ok(all)
    }

    fn wire(&self, of: &MessageDescriptor, text: &[u8]) -> Result<Vec<v1::Resource>, Status> {
        let utf8 = std::str::from_utf8(text).map_err(|_| bad("body", "is not UTF-8".to_owned()))?;
        let mut resources = if self.is_yaml {
            manifests(utf8)?
        } else {
            let mut json: Json =
                serde_json::from_str(utf8).map_err(|error| bad("body", format!("is not JSON: {error}")))?;
            let many = json
                .get_mut("items")
                .filter(|items| items.is_array())
                .map(Json::take);
            let whole = many.unwrap_or(json);
            let items = if let Json::Array(items) = whole {
                items
            } else {
                vec![whole]
            };
            let mut resources = Vec::with_capacity(items.len());
            for item in items {
                if item.get("apiVersion").is_some() {
                    resources.extend(manifests(&item.to_string())?);
                } else {
                    let message = read(of, item.to_string().as_bytes())?.encode_to_vec();
                    let resource = v1::Resource::decode(message.as_slice());
                    resources.push(resource.map_err(|error| bad("body", error.to_string()))?);
                }
            }
            resources
        };
        if let Some(named) = &self.named {
            let [resource] = resources.as_mut_slice() else {
                let count = resources.len();
                return Err(bad(
                    "body",
                    format!("has {count} resources; want the one that the path names"),
                ));
            };
            check_name(resource, named)?;
        }
        Ok(resources)
    }
}

/// Whether a resource is the one that a path names. One without a name gets it from there.
fn check_name(resource: &mut v1::Resource, (kind, name): &(String, String)) -> Result<(), Status> {
    let metadata = resource.metadata.get_or_insert_default();
    if metadata.name.is_empty() {
        metadata.name.clone_from(name);
    }
    if metadata.name != *name {
        let there: String = metadata.name.chars().take(80).collect();
        return Err(bad(
            "metadata.name",
            format!("is {there:?}, and {name:?} in the path"),
        ));
    }
    let there = leeward_proto::spec_kind(resource).map(leeward_policy::Kind::as_str);
    match there {
        Some(there) if there != kind => Err(bad("kind", format!("is {there}, and {kind} in the path"))),
        // Without a spec it is refused as it would be anywhere.
        Some(_) | None => Ok(()),
    }
}

fn manifests(text: &str) -> Result<Vec<v1::Resource>, Status> {
    manifest::parse("body", text).map_err(|errors| {
        let field = |error: manifest::ManifestError| BadField {
            path: error.path,
            reason: format!("{} (line {})", error.reason, error.place.line),
        };
        status(Refused::Bad(errors.into_iter().map(field).collect()))
    })
}

/// Reads a message from JSON.
fn read(of: &MessageDescriptor, text: &[u8]) -> Result<DynamicMessage, Status> {
    let wrong = |error: serde_json::Error| bad("body", format!("is not {} in JSON: {error}", of.name()));
    let mut json = serde_json::Deserializer::from_slice(text);
    let message = DynamicMessage::deserialize(of.clone(), &mut json).map_err(wrong)?;
    json.end().map_err(wrong)?;
    Ok(message)
}

fn parameters(query: &str) -> Result<Vec<(String, String)>, Status> {
    let pairs: Vec<&str> = query.split('&').filter(|pair| !pair.is_empty()).collect();
    if pairs.len() > MAX_PARAMETERS {
        let reason = format!("has {} parameters; want at most {MAX_PARAMETERS}", pairs.len());
        return Err(bad("query", reason));
    }
    let text = |part: &str| {
        let spaced = part.replace('+', " ");
        let decoded = percent_decode_str(&spaced)
            .decode_utf8()
            .map(std::borrow::Cow::into_owned);
        decoded.map_err(|_| bad("query", format!("{part:?} is not UTF-8")))
    };
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        Ok((text(name)?, text(value)?))
    };
    pairs.into_iter().map(pair).collect()
}

/// Puts what a path or a query says of a field where it stands in JSON.
fn put(of: &MessageDescriptor, object: &mut Map<String, Json>, path: &str, text: &str) -> Result<(), Status> {
    let (name, rest) = path
        .split_once('.')
        .map_or((path, None), |(name, rest)| (name, Some(rest)));
    let field = of
        .get_field_by_json_name(name)
        .or_else(|| of.get_field_by_name(name));
    let field = field.ok_or_else(|| {
        let shown: String = path.chars().take(80).collect();
        let known: Vec<_> = of.fields().map(|field| field.json_name().to_owned()).collect();
        bad(&shown, format!("is no parameter; there are {}", known.join(", ")))
    })?;
    let key = field.json_name().to_owned();
    match (rest, field.kind()) {
        (Some(rest), Kind::Message(message)) if !field.is_list() && !field.is_map() => {
            let inner = object.entry(key).or_insert_with(|| Json::Object(Map::new()));
            if let Json::Object(inner) = inner {
                put(&message, inner, rest, text)
            } else {
                Err(bad(path, "stands twice".to_owned()))
            }
        }
        (Some(_), _) => Err(bad(path, "is no parameter".to_owned())),
        (None, kind) if field.is_list() => {
            let value = scalar(&kind, path, text)?;
            let list = object.entry(key).or_insert_with(|| Json::Array(Vec::new()));
            if let Json::Array(list) = list {
                list.push(value);
                Ok(())
            } else {
                Err(bad(path, "stands twice".to_owned()))
            }
        }
        (None, kind) => {
            if object.insert(key, scalar(&kind, path, text)?).is_some() {
                return Err(bad(path, "stands twice".to_owned()));
            }
            Ok(())
        }
    }
}

fn scalar(kind: &Kind, path: &str, text: &str) -> Result<Json, Status> {
    if matches!(kind, Kind::Bool) {
        // `?dryRun` is enough.
        return match text {
            "true" | "" => Ok(Json::Bool(true)),
            "false" => Ok(Json::Bool(false)),
            _ => Err(bad(path, format!("{text:?} is not true or false"))),
        };
    }
    if kind
        .as_enum()
        .is_some_and(|known| known.full_name() == "leeward.v1.Kind")
    {
        let kind = leeward_policy::Kind::named(text);
        let kind = kind.map(|kind| leeward_proto::render_kind(kind).as_str_name());
        return Ok(Json::from(kind.unwrap_or(text)));
    }
    // Timestamps and durations are texts in JSON, too.
    Ok(Json::from(text))
}
