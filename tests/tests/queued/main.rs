//! Orders that are taken in while their service is away, on real proxies: what clients are told, what the service
//! gets, what people see, and what is left when something breaks.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says its figures on stderr"
)]

mod bounds;
mod broken;
mod delivered;
mod kills;
mod people;
mod told;

use anyhow::{Context, ensure};
use http::{Method, Request};
use leeward_identity::{Identity, SpiffeId};
use leeward_testkit::policy::{fallback, queue, route, service};
use leeward_testkit::{
    Backend, Body, Client, Mesh, Node, Protocol, Reply, binaries, bytes_body, eventually, request,
    with_header,
};
use serde_json::Value;
use std::process::Output;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SOON: Duration = Duration::from_secs(60);
const HOST: &str = "orders.example";
/// A queue that loses no time.
const QUICK: &[&str] = &[
    "baseInterval: 20ms",
    "maxInterval: 200ms",
    "maxRate: 10000",
    "maxConcurrency: 32",
];
/// Every request of a client's fails before it is sent; what is delivered from the queue does not.
const TAKE_ALL_IN: &str = "fault: {abort: ConnectFailure}";

/// A service for orders, whose failed requests go up a ladder to the queue `orders`. `queue` are the lines of its
/// spec, `rungs` what follows it, `rule` further lines of the route's rule.
fn policy(orders: &Backend, lines: &[&str], rungs: &[&str], rule: &[&str]) -> String {
    let rungs: Vec<&str> = std::iter::once("queue: {queue: orders}")
        .chain(rungs.iter().copied())
        .collect();
    let rule: Vec<&str> = std::iter::once("fallback: later")
        .chain(rule.iter().copied())
        .collect();
    service("orders", &[(orders.address(), "a", "")], &[])
        + &queue("orders", lines)
        + &fallback("later", &rungs, &["onStatuses: [503]"])
        + &route("orders", HOST, "orders", &rule)
}

/// One proxy in one zone.
async fn one() -> anyhow::Result<Mesh> {
    Mesh::builder()
        .node("a", "a1")
        .flag("--access-log", "stdout")
        .start()
        .await
}

fn order(key: &str) -> Request<Body> {
    with_header(plain_order("an order"), "idempotency-key", key)
}

fn plain_order(body: &str) -> Request<Body> {
    request(
        Method::POST,
        HOST,
        "/orders?from=shop",
        bytes_body(body.to_owned()),
    )
}

/// Where the client of an order that was taken in is to ask for it.
fn location(reply: &Reply) -> anyhow::Result<String> {
    ensure!(reply.status == 202, "not taken in: {reply:?} {}", reply.text());
    Ok(reply.header("location").to_owned())
}

/// What became of an order.
async fn state(client: &Client, location: &str) -> anyhow::Result<Value> {
    let reply = client.get(HOST, location).await?;
    ensure!(reply.status == 200, "{location}: {reply:?}");
    Ok(serde_json::from_slice(&reply.body)?)
}

/// Waits until an order is in this state, and returns what is told of it then.
async fn reaches(client: &Client, location: &str, wanted: &str) -> anyhow::Result<Value> {
    eventually("an order's state", SOON, || async {
        let told = state(client, location).await?;
        ensure!(told["state"] == wanted, "{told}");
        Ok(told)
    })
    .await
}

/// How the queue `orders` is, as the proxy's admin listener says.
async fn reading(node: &Node) -> anyhow::Result<Value> {
    let reply = Client::new(node.admin, Protocol::Http1)
        .get("admin", "/queues")
        .await?;
    let all: Value = serde_json::from_slice(&reply.body)?;
    let queues = all["queues"].as_array().context("no queues")?;
    let found = queues.iter().find(|queue| queue["queue"] == "orders");
    found
        .cloned()
        .with_context(|| format!("no queue orders in {all}"))
}

/// Waits until nothing waits any more.
async fn emptied(node: &Node, within: Duration) -> anyhow::Result<Value> {
    eventually("the queue to be empty", within, || async {
        let now = reading(node).await?;
        ensure!(now["available"] == true && now["waiting"] == 0, "{now}");
        Ok(now)
    })
    .await
}

/// Runs `leeward`.
async fn leeward(args: &[&str]) -> anyhow::Result<Output> {
    let mut command = tokio::process::Command::new(binaries::path("leeward")?);
    command.args(args).kill_on_drop(true);
    let ended = tokio::time::timeout(SOON, command.output()).await;
    Ok(ended.with_context(|| format!("leeward {args:?} doesn't end"))??)
}

/// What it says on standard output, if it succeeds.
async fn leeward_says(args: &[&str]) -> anyhow::Result<String> {
    let out = leeward(args).await?;
    ensure!(out.status.success(), "{args:?}: {out:?}");
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// What the inbound listener answers to a GET of another proxy's.
async fn inbound(mesh: &Mesh, path: &str) -> anyhow::Result<String> {
    let (inbound, identity) = (mesh.node("a1")?.inbound, Identity::load(mesh.identity("a1"))?);
    let config = identity.client_config(&[b"http/1.1"], &SpiffeId::proxy("leeward.test", "a", "a1")?)?;
    let stream = tokio::net::TcpStream::connect(inbound).await?;
    let name = inbound.ip().into();
    let mut stream = tokio_rustls::TlsConnector::from(config)
        .connect(name, stream)
        .await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    tokio::time::timeout(SOON, stream.read_to_string(&mut answer)).await??;
    Ok(answer)
}
