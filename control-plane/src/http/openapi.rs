//! The document of the HTTP API (OpenAPI 3.1), made of the descriptors and their comments.

#![allow(
    clippy::indexing_slicing,
    reason = "objects of JSON that are made here: a field that is not there is null, or is made"
)]

use super::descriptors;
use super::routes::{BodyIs, FRIENDLY, Friendly, method, served, short};
use bytes::Bytes;
use prost_reflect::{
    Cardinality, FieldDescriptor, FileDescriptor, Kind, MessageDescriptor, MethodDescriptor,
};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// The document.
pub(super) fn document() -> &'static Bytes {
    static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(make().to_string()));
    &DOCUMENT
}

fn make() -> Value {
    let mut schemas = Schemas::default();
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for friendly in FRIENDLY {
        if let Some(method) = method(friendly.rpc) {
            let http = friendly.http.to_lowercase();
            let at = paths.entry(friendly.path.to_owned()).or_default();
            match (at.get_mut(&http), friendly.only_with) {
                // Two calls share a path, and a parameter tells them apart: the one without it is told, the other named.
                (Some(there), None) => {
                    let streamed = there["responses"]["200"]["content"].clone();
                    *there = self::friendly(&mut schemas, friendly, method);
                    merge_watch(there, &streamed);
                }
                _ => drop(at.insert(http, self::friendly(&mut schemas, friendly, method))),
            }
        }
    }
    for method in served() {
        let mut operation = Map::new();
        operation.insert("post".to_owned(), uniform(&mut schemas, method));
        paths.insert(format!("/v1/{}", short(method)), operation);
    }
    paths.insert("/openapi.json".to_owned(), own());
    let status = schemas.reference_to("google.rpc.Status");
    let schemas = schemas.finish();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Leeward control plane",
            "version": "v1",
            "description": "The API of a Leeward control plane over HTTP and JSON. Every call is a gRPC call as well, with the same checks and the same errors. Messages are in protobuf's JSON: fields in lowerCamelCase, 64-bit numbers as strings, bytes in base64, durations as \"1.5s\".",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                "Error": {
                    "description": "It was refused, or has failed.",
                    "content": {"application/json": {"schema": status}},
                },
            },
            "parameters": {
                "Reason": {
                    "name": "leeward-reason", "in": "header", "required": false,
                    "description": "Why it is done; without it the role BREAKGLASS gives nothing.",
                    "schema": {"type": "string", "maxLength": 500},
                },
            },
            "securitySchemes": {
                "certificate": {"type": "mutualTLS", "description": "A certificate of the mesh, of a user."},
                "token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "A token of the OIDC issuer that the control plane was given."},
            },
        },
        "security": [{"certificate": []}, {"token": []}],
    })
}

fn own() -> Map<String, Value> {
    let get = json!({
        "operationId": "openapi", "summary": "This document.",
        "responses": {
            "200": {"description": "It.", "content": {"application/json": {"schema": {"type": "object"}}}},
            "default": {"$ref": "#/components/responses/Error"},
        },
    });
    Map::from_iter([("get".to_owned(), get)])
}

fn merge_watch(operation: &mut Value, streamed: &Value) {
    if let (Some(content), Some(streamed)) = (
        operation["responses"]["200"]["content"].as_object_mut(),
        streamed.as_object(),
    ) {
        content.extend(streamed.clone());
    }
    let watch = json!({
        "name": "watch", "in": "query", "required": false, "allowEmptyValue": true, "schema": {"type": "boolean"},
        "description": "Watch in place of listing: the answer is a stream of changes, and the parameters are those of Watch (afterRevision, selector).",
    });
    let after = json!({
        "name": "afterRevision", "in": "query", "required": false, "schema": {"type": "string", "format": "uint64"},
        "description": "With watch: changes after this revision; 0 starts with everything there is.",
    });
    if let Some(parameters) = operation["parameters"].as_array_mut() {
        parameters.extend([watch, after]);
    }
}

fn uniform(schemas: &mut Schemas, method: &MethodDescriptor) -> Value {
    let content = if method.is_client_streaming() {
        "application/x-ndjson"
    } else {
        "application/json"
    };
    let input = schemas.message(&method.input());
    let mut operation = operation(schemas, method, &short(method).replace('/', "_"));
    operation["requestBody"] = json!({"required": true, "content": {content: {"schema": input}}});
    if method.is_client_streaming() {
        operation["requestBody"]["description"] = json!("One message on each line.");
    }
    operation
}

fn operation(schemas: &mut Schemas, method: &MethodDescriptor, id: &str) -> Value {
    let output = schemas.message(&method.output());
    let service = method.parent_service();
    let content = if method.is_server_streaming() {
        let status = schemas.reference_to("google.rpc.Status");
        json!({"application/x-ndjson": {"schema": {
            "type": "object",
            "description": "One on each line; an error is the last.",
            "properties": {"result": output, "error": status},
        }}})
    } else {
        json!({"application/json": {"schema": output}})
    };
    let text = comment(&method.parent_file(), method.path());
    json!({
        "operationId": id,
        "tags": [service.name()],
        "summary": text.split_terminator(['.', ':']).next().unwrap_or_default(),
        "description": text,
        "parameters": [{"$ref": "#/components/parameters/Reason"}],
        "responses": {
            "200": {"description": "It was done.", "content": content},
            "default": {"$ref": "#/components/responses/Error"},
        },
    })
}

fn friendly(schemas: &mut Schemas, friendly: &Friendly, method: &MethodDescriptor) -> Value {
    let id = format!(
        "{}{}",
        friendly.http.to_lowercase(),
        friendly.path.replace(['/', '{', '}'], "_")
    );
    let mut operation = operation(schemas, method, &id);
    operation["summary"] = json!(friendly.summary);
    let mut parameters = vec![json!({"$ref": "#/components/parameters/Reason"})];
    for name in friendly
        .path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
    {
        let description = match name {
            "kind" => "A kind, in any case, in the singular or the plural: route, Routes, fallbackpolicies.",
            _ => "The name of a resource.",
        };
        parameters.push(json!({
            "name": name, "in": "path", "required": true, "description": description, "schema": {"type": "string"},
        }));
    }
    let in_path = |field: &FieldDescriptor| {
        let named = |(_, path): &(&str, &str)| path.split('.').next() == Some(field.name());
        friendly.fields.iter().any(named)
    };
    for field in method.input().fields().filter(|field| !in_path(field)) {
        let is_body = friendly.body != BodyIs::Nothing && field.name() == "resources";
        if let Some(schema) = query_schema(&field).filter(|_| !is_body) {
            parameters.push(json!({
                "name": field.json_name(), "in": "query", "required": false, "schema": schema,
                "description": comment(&field.parent_message().parent_file(), field.path()),
            }));
        }
    }
    operation["parameters"] = Value::Array(parameters);
    let resource = schemas.reference_to("leeward.v1.Resource");
    let manifest = json!({"type": "object", "description": "A resource as `leeward apply` takes it.", "required": ["apiVersion", "kind", "metadata"]});
    operation["requestBody"] = match friendly.body {
        BodyIs::Nothing | BodyIs::Message => return without_body(operation),
        BodyIs::Resource => json!({"required": true, "content": {
            "application/json": {"schema": {"anyOf": [resource, manifest]}},
            "application/yaml": {"schema": manifest},
        }}),
        BodyIs::Resources => json!({"required": true, "content": {
            "application/json": {"schema": {"anyOf": [resource, manifest, {"type": "array", "items": {"anyOf": [resource, manifest]}}]}},
            "application/yaml": {"schema": {"description": "Documents set apart by ---."}},
        }}),
    };
    operation
}

fn without_body(mut operation: Value) -> Value {
    if let Some(fields) = operation.as_object_mut() {
        fields.remove("requestBody");
    }
    operation
}

/// What a field is in a query; messages with fields of their own are in bodies only.
fn query_schema(field: &FieldDescriptor) -> Option<Value> {
    if field.is_map() {
        return None;
    }
    let kind = field.kind();
    let one = match (kind.as_message(), kind.as_enum()) {
        (Some(message), _) => well_known(message.full_name())?,
        (None, Some(of)) => words(of),
        (None, None) => primitive(&kind),
    };
    Some(if field.is_list() {
        json!({"type": "array", "items": one})
    } else {
        one
    })
}

/// The messages and enums that were named, each told once.
#[derive(Default)]
struct Schemas {
    done: BTreeMap<String, Value>,
}

impl Schemas {
    fn reference_to(&mut self, name: &str) -> Value {
        match descriptors().get_message_by_name(name) {
            Some(message) => self.message(&message),
            None => json!({"type": "object"}),
        }
    }

    fn message(&mut self, message: &MessageDescriptor) -> Value {
        let name = message.full_name().to_owned();
        if let Some(schema) = well_known(&name) {
            return schema;
        }
        let reference = json!({"$ref": format!("#/components/schemas/{name}")});
        if self.done.contains_key(&name) {
            return reference;
        }
        // Before its fields, which may lead back here.
        self.done.insert(name.clone(), Value::Null);
        let mut properties = Map::new();
        for field in message.fields() {
            properties.insert(field.json_name().to_owned(), self.field(&field));
        }
        let mut schema = json!({"type": "object", "properties": properties, "additionalProperties": false});
        let text = comment(&message.parent_file(), message.path());
        let choices: Vec<_> = message
            .oneofs()
            .filter(|oneof| !oneof.is_synthetic())
            .map(|oneof| {
                let fields: Vec<_> = oneof.fields().map(|field| field.json_name().to_owned()).collect();
                format!("At most one of {}.", fields.join(", "))
            })
            .collect();
        let text = [text]
            .into_iter()
            .chain(choices)
            .filter(|text| !text.is_empty())
            .collect::<Vec<_>>();
        if !text.is_empty() {
            schema["description"] = json!(text.join("\n\n"));
        }
        self.done.insert(name, schema);
        reference
    }

    fn field(&mut self, field: &FieldDescriptor) -> Value {
        let mut schema = if field.is_map() {
            let entry = field.kind();
            let value = entry.as_message().map(MessageDescriptor::map_entry_value_field);
            let value = value.map_or_else(|| json!({}), |value| self.one(&value.kind()));
            json!({"type": "object", "additionalProperties": value})
        } else {
            let one = self.one(&field.kind());
            if field.cardinality() == Cardinality::Repeated {
                json!({"type": "array", "items": one})
            } else {
                one
            }
        };
        let text = comment(&field.parent_message().parent_file(), field.path());
        if !text.is_empty() {
            schema["description"] = json!(text);
        }
        schema
    }

    fn one(&mut self, kind: &Kind) -> Value {
        match (kind.as_message(), kind.as_enum()) {
            (Some(message), _) => self.message(message),
            (None, Some(of)) => {
                let name = of.full_name().to_owned();
                if !self.done.contains_key(&name) {
                    let mut schema = words(of);
                    let told = of.values().filter_map(|value| {
                        let text = comment(&of.parent_file(), value.path());
                        (!text.is_empty()).then(|| format!("- {}: {text}", value.name()))
                    });
                    let all: Vec<_> = [comment(&of.parent_file(), of.path())]
                        .into_iter()
                        .chain(told)
                        .collect();
                    schema["description"] = json!(all.join("\n").trim());
                    self.done.insert(name.clone(), schema);
                }
                json!({"$ref": format!("#/components/schemas/{name}")})
            }
            (None, None) => primitive(kind),
        }
    }

    fn finish(self) -> BTreeMap<String, Value> {
        self.done
    }
}

fn words(of: &prost_reflect::EnumDescriptor) -> Value {
    let values: Vec<_> = of.values().map(|value| value.name().to_owned()).collect();
    json!({"type": "string", "enum": values})
}

fn primitive(kind: &Kind) -> Value {
    match kind {
        Kind::Double | Kind::Float => json!({"type": "number"}),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => json!({"type": "integer", "format": "int32"}),
        Kind::Uint32 | Kind::Fixed32 => json!({"type": "integer", "minimum": 0, "maximum": u32::MAX}),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => json!({"type": "string", "format": "int64"}),
        Kind::Uint64 | Kind::Fixed64 => json!({"type": "string", "format": "uint64"}),
        Kind::Bool => json!({"type": "boolean"}),
        Kind::Bytes => json!({"type": "string", "contentEncoding": "base64"}),
        Kind::String | Kind::Message(_) | Kind::Enum(_) => json!({"type": "string"}),
    }
}

/// Messages that JSON has forms of their own for.
fn well_known(name: &str) -> Option<Value> {
    Some(match name {
        "google.protobuf.Timestamp" => json!({"type": "string", "format": "date-time"}),
        "google.protobuf.Duration" => json!({"type": "string", "pattern": "^-?[0-9]+(\\.[0-9]{1,9})?s$"}),
        "google.protobuf.Any" => json!({
            "type": "object", "properties": {"@type": {"type": "string"}}, "required": ["@type"],
            "additionalProperties": true,
        }),
        "google.protobuf.BoolValue" => json!({"type": "boolean"}),
        "google.protobuf.StringValue" => json!({"type": "string"}),
        "google.protobuf.DoubleValue" => json!({"type": "number"}),
        "google.protobuf.UInt32Value" | "google.protobuf.Int32Value" => json!({"type": "integer"}),
        "google.protobuf.UInt64Value" | "google.protobuf.Int64Value" => json!({"type": "string"}),
        "google.protobuf.Empty" | "google.protobuf.Struct" => json!({"type": "object"}),
        _ => return None,
    })
}

/// What stands before something in its file.
fn comment(file: &FileDescriptor, path: &[i32]) -> String {
    static COMMENTS: LazyLock<BTreeMap<(String, Vec<i32>), String>> = LazyLock::new(|| {
        let mut all = BTreeMap::new();
        for file in descriptors().files() {
            let locations = file
                .file_descriptor_proto()
                .source_code_info
                .iter()
                .flat_map(|info| &info.location);
            for location in locations {
                let text = location.leading_comments().trim();
                if !text.is_empty() {
                    let lines: Vec<_> = text.lines().map(str::trim).collect();
                    all.insert((file.name().to_owned(), location.path.clone()), lines.join("\n"));
                }
            }
        }
        all
    });
    let key = (file.name().to_owned(), path.to_vec());
    COMMENTS.get(&key).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn references(value: &Value, found: &mut BTreeSet<String>) {
        if let Some(fields) = value.as_object() {
            if let Some(Value::String(to)) = fields.get("$ref") {
                found.insert(to.clone());
            }
            fields.values().for_each(|value| references(value, found));
        }
        if let Some(items) = value.as_array() {
            items.iter().for_each(|value| references(value, found));
        }
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_operation_has_a_name_of_its_own() {
        let made: Value = serde_json::from_slice(document()).unwrap();
        let mut found = BTreeSet::new();
        references(&made, &mut found);
        for to in found {
            let pointer = to.strip_prefix('#').unwrap();
            assert!(made.pointer(pointer).is_some_and(|to| !to.is_null()), "{to}");
        }
        let mut ids = BTreeSet::new();
        for (path, operations) in made["paths"].as_object().unwrap() {
            for (http, operation) in operations.as_object().unwrap() {
                let id = operation["operationId"].as_str().unwrap();
                assert!(ids.insert(id.to_owned()), "{id} stands twice");
                let named: Vec<_> = path.split('/').filter(|part| part.starts_with('{')).collect();
                let parameters = operation["parameters"].as_array().map_or(&[][..], Vec::as_slice);
                let in_path: Vec<_> = parameters.iter().filter(|p| p["in"] == "path").collect();
                assert_eq!(named.len(), in_path.len(), "{http} {path}");
                assert!(
                    operation["responses"]["200"]["content"].is_object(),
                    "{http} {path}"
                );
            }
        }
    }

    #[test]
    fn what_the_protos_say_is_what_people_read() {
        let made: Value = serde_json::from_slice(document()).unwrap();
        let schemas = &made["components"]["schemas"];
        let labels = &schemas["leeward.v1.Metadata"]["properties"]["labels"];
        assert!(
            labels["description"]
                .as_str()
                .unwrap()
                .contains("At most 64 labels"),
            "{labels}"
        );
        assert_eq!(labels["additionalProperties"], json!({"type": "string"}));
        let apply = &made["paths"]["/v1/PolicyService/Apply"]["post"];
        assert!(
            apply["description"].as_str().unwrap().contains("one transaction"),
            "{apply}"
        );
    }
}
