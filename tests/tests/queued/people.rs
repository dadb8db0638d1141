//! What people see of queues, and do with them.

use crate::{HOST, QUICK, leeward, leeward_says, location, one, order, policy, reaches};
use http::Method;
use leeward_testkit::{Answer, Backend, Behave, Client, Protocol, empty_body, request, with_header};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_are_shown_sent_again_and_dropped() -> anyhow::Result<()> {
    let mesh = one().await?;
    let orders = Backend::refusing("orders")?;
    mesh.apply(&policy(&orders, QUICK, &[], &[])).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let mut ids = Vec::new();
    for key in ["one", "two", "three"] {
        let order = with_header(order(key), "authorization", "Bearer secret");
        let place = location(&client.call(order).await?)?;
        ids.push(place.rsplit('/').next().unwrap_or_default().to_owned());
    }
    let place = |id: &str| format!("/.well-known/leeward/queue/{id}");
    let address = mesh.node("a1")?.admin.to_string();
    let admin = ["--admin", &address];
    let with = |args: &[&str]| -> Vec<String> {
        let all = ["queue"].iter().chain(args).chain(&admin);
        all.map(|arg| (*arg).to_owned()).collect()
    };
    let says = |args: &[&str]| {
        let args = with(args);
        async move { leeward_says(&args.iter().map(String::as_str).collect::<Vec<_>>()).await }
    };

    let list = says(&["list"]).await?;
    let row: Vec<&str> = list
        .lines()
        .nth(1)
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    assert!(list.starts_with("QUEUE"), "{list}");
    assert_eq!(
        (row[0], row[1], row[2], row[5]),
        ("orders", "sqlite", "3", "0"),
        "{list}"
    );
    assert!(list.contains("delivering"), "{list}");
    let show = says(&["show", "orders"]).await?;
    assert!(ids.iter().all(|id| show.contains(id.as_str())), "{show}");
    assert!(show.contains("POST /orders?from=shop"), "{show}");
    let page: Value = serde_json::from_str(&says(&["show", "orders", "--limit", "2", "-o", "json"]).await?)?;
    assert_eq!(page["entries"].as_array().map(Vec::len), Some(2), "{page}");
    let rest = [
        "show",
        "orders",
        "--after",
        &page["next"].to_string(),
        "-o",
        "json",
    ];
    let rest: Value = serde_json::from_str(&says(&rest).await?)?;
    assert_eq!(rest["entries"][0]["id"], ids[2], "{rest}");
    let shown: Value = serde_json::from_str(&says(&["show", "orders", &ids[0], "-o", "json"]).await?)?;
    assert_eq!(
        (&shown["idempotency_key"], &shown["body"], &shown["authority"]),
        (&"one".into(), &"an order".into(), &HOST.into())
    );
    assert!(
        shown.to_string().contains("not shown") && !shown.to_string().contains("secret"),
        "{shown}"
    );

    // A word against them ends them at once.
    orders.behave(Behave::Answer(Answer::status(422)));
    orders.resume()?;
    for id in &ids {
        let told = reaches(&client, &place(id), "dead").await?;
        assert_eq!(
            (&told["reason"], &told["attempts"]),
            (&"status 422".into(), &1.into()),
            "{told}"
        );
    }
    let dead = says(&["show", "orders", "--dead"]).await?;
    assert!(
        ids.iter().all(|id| dead.contains(id.as_str())) && dead.contains("status 422"),
        "{dead}"
    );
    assert_eq!(says(&["show", "orders"]).await?.trim(), "no entries");

    orders.behave(Behave::Answer(Answer::status(200)));
    assert_eq!(
        says(&["retry", "orders", &ids[0]]).await?.trim(),
        "1 entry will be sent again"
    );
    assert_eq!(
        reaches(&client, &place(&ids[0]), "delivered").await?["status"],
        200
    );
    assert_eq!(
        says(&["drop", "orders", &ids[1]]).await?.trim(),
        "1 entry dropped"
    );
    assert_eq!(client.get(HOST, &place(&ids[1])).await?.status, 404);
    assert_eq!(
        says(&["retry", "orders", "--all"]).await?.trim(),
        "1 entry will be sent again"
    );
    reaches(&client, &place(&ids[2]), "delivered").await?;
    assert_eq!(
        says(&["drop", "orders", "--all"]).await?.trim(),
        "0 entries dropped"
    );

    for (args, why) in [
        (&["show", "nothing"][..], "there is no queue \"nothing\""),
        (&["retry", "orders", &ids[1]], "has no dead letter"),
        (&["drop", "orders", "x"], "32 hex digits"),
        (&["show", "a/b"], "want letters, digits and dashes"),
    ] {
        let args = with(args);
        let out = leeward(&args.iter().map(String::as_str).collect::<Vec<_>>()).await?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(why), "{args:?}: {out:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_in_a_browser_can_do_nothing_to_queues() -> anyhow::Result<()> {
    let mesh = one().await?;
    let orders = Backend::refusing("orders")?;
    mesh.apply(&policy(&orders, QUICK, &[], &[])).await?;
    let client = mesh.workload("a1", Protocol::Http1)?;
    let place = location(&client.call(order("one")).await?)?;
    let id = place.rsplit('/').next().unwrap_or_default();
    let admin = Client::new(mesh.node("a1")?.admin, Protocol::Http1);
    let drop = format!("/queues/orders/drop?id={id}");
    for origin in ["http://evil.example", "null"] {
        let ask = request(Method::POST, "admin", &drop, empty_body());
        let reply = admin.call(with_header(ask, "origin", origin)).await?;
        assert_eq!(reply.status, 403, "{reply:?}");
    }
    for (method, path, status) in [
        (Method::GET, drop.as_str(), 404),
        (Method::PUT, "/queues/orders", 405),
        (Method::POST, "/queues", 405),
        (Method::GET, "/queuesorders", 404),
        (Method::GET, "/queues/orders?state=other", 400),
        (Method::GET, "/queues/orders?limit=x", 400),
    ] {
        let reply = admin
            .call(request(method.clone(), "admin", path, empty_body()))
            .await?;
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.text());
    }
    assert_eq!(crate::state(&client, &place).await?["state"], "waiting");
    let reply = admin
        .call(request(Method::POST, "admin", &drop, empty_body()))
        .await?;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(client.get(HOST, &place).await?.status, 404);
    Ok(())
}
