//! The proxy-wasm host with guests in text: how machines begin and end, and what goes on beside requests.

#![allow(
    clippy::disallowed_methods,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    dead_code,
    reason = "tests"
)]

#[path = "proxy_wasm/guest.rs"]
mod guest;
#[path = "proxy_wasm/rig.rs"]
mod rig;

use guest::{ONCE, PASS, guest};
use leeward_policy::model::PluginLimits;
use leeward_wasm::{Fault, LoadError, Step};
use rig::{Rig, answer, bytes, fields, head, load, now, resumed, run, spec, value};
use std::time::Duration;

#[test]
fn a_module_that_is_no_plugin_is_refused_when_it_is_loaded() {
    run(async {
        let rig = Rig::new(&guest(PASS)).await;
        let memory = r#"(memory (export "memory") 1)"#;
        let abi = r#"(func (export "proxy_abi_version_0_2_1"))"#;
        for (module, want) in [
            (format!("(module {memory})"), "proxy_abi_version_0_2_0"),
            (format!("(module {abi})"), "memory"),
            (
                format!(r#"(module (import "env" "open" (func)) {memory} {abi})"#),
                "env::open",
            ),
            (
                format!(r#"(module (import "env" "proxy_log" (func)) {memory} {abi})"#),
                "proxy_log",
            ),
            (
                format!(
                    r#"(module (import "host" "deliver" (func (param i32) (result i32))) {memory} {abi})"#
                ),
                "deliver",
            ),
            (
                format!(r#"(module {memory} {abi} (func (export "proxy_on_done") (param i32 i32)))"#),
                "exports proxy_on_done with other parameters or results; want 1 and 1",
            ),
            (
                format!(r#"(module {memory} {abi} (global (export "malloc") i32 (i32.const 0)))"#),
                "malloc",
            ),
        ] {
            let module = wat::parse_str(&module).unwrap();
            let error = load(&rig.host, &rig.spec, &module).await.unwrap_err();
            assert!(matches!(error, LoadError::Module { .. }), "{error}");
            assert!(error.to_string().contains(want), "{error}; want {want}");
        }
        // What was there still is.
        rig.pass().await;
    });
}

/// Counts what it is called for: `start`, `configure`, `create`, `done`, `log`, `delete`.
const LIFE: &str = r#"
  (func $count (param $name i32) (param $len i32)
    (call $ok (call $proxy_define_metric (i32.const 0) (local.get $name) (local.get $len) (i32.const 8)))
    (call $ok (call $proxy_increment_metric (i32.load (i32.const 8)) (i64.const 1))))
  (func (export "proxy_on_context_create") (param $id i32) (param $parent i32)
    (if (local.get $parent) (then (call $count @"create")) (else (call $count @"root"))))
  (func (export "proxy_on_vm_start") (param $root i32) (param $len i32) (result i32)
    (call $count @"start")
    (call $ok (call $proxy_get_buffer_bytes (i32.const 6) (i32.const 0) (i32.const -1) (i32.const 16) (i32.const 20)))
    (if (i32.ne (i32.load (i32.const 20)) (local.get $len)) (then unreachable))
    (call $gauge @"machine" (local.get $len))
    (i32.const 1))
  (func (export "proxy_on_configure") (param $root i32) (param $len i32) (result i32)
    (call $count @"configure")
    (call $gauge @"config" (local.get $len))
    (if (i32.eqz (local.get $len)) (then (return (i32.const 1))))
    (call $ok (call $proxy_get_buffer_bytes (i32.const 7) (i32.const 0) (i32.const -1) (i32.const 16) (i32.const 20)))
    (if (i32.ne (i32.load (i32.const 20)) (local.get $len)) (then unreachable))
    ;; It takes no configuration that begins with "n".
    (i32.ne (i32.load8_u (i32.load (i32.const 16))) (i32.const 110)))
  (func (export "proxy_on_log") (param i32) (call $count @"log"))
  (func (export "proxy_on_delete") (param i32) (call $count @"delete"))
"#;

fn counts(rig: &Rig) -> [u64; 7] {
    NAMES.map(|name| rig.seen.counts.borrow().get(name).copied().unwrap_or_default())
}

/// Waits until it is so: what a request leaves to be done may take a moment.
async fn becomes<T: PartialEq + std::fmt::Debug>(is: impl Fn() -> T, want: T) {
    let deadline = now() + Duration::from_secs(20);
    while is() != want && now() < deadline {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(is(), want);
}

const NAMES: [&str; 7] = ["start", "root", "configure", "create", "done", "log", "delete"];

#[test]
fn a_machine_has_a_root_context_for_each_configuration_and_one_for_each_request() {
    run(async {
        let done =
            r#"(func (export "proxy_on_done") (param i32) (result i32) (call $count @"done") (i32.const 1))"#;
        let rig = Rig::new(&guest(&format!("{LIFE} {done} {PASS}"))).await;
        for config in ["", "a", "a", "bc"] {
            let mut filter = rig.filter_with(config).await;
            rig.request(&mut filter).await;
        }
        becomes(|| counts(&rig), [1, 3, 3, 4, 4, 4, 4]).await;
        assert_eq!(
            (rig.seen.gauge("machine"), rig.seen.gauge("config")),
            (Some(13.0), Some(2.0))
        );
        // A filter that was never used has no context.
        drop(rig.filter().await);
        becomes(|| counts(&rig), [1, 3, 3, 4, 4, 4, 4]).await;
        let order: Vec<_> = rig
            .seen
            .calls
            .borrow()
            .iter()
            .map(|(called, _)| *called)
            .collect();
        let want = [
            "proxy_on_request_headers",
            "proxy_on_done",
            "proxy_on_log",
            "proxy_on_delete",
        ];
        assert_eq!(order[order.len() - 4..], want);
        becomes(|| contexts(&rig), 3).await;
    });
}

/// Contexts that there are; 0 while the machine is at work.
fn contexts(rig: &Rig) -> usize {
    let text = format!("{:?}", rig.worker);
    let Some((_, rest)) = text.split_once("contexts: ") else {
        return 0;
    };
    rest.chars()
        .take_while(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .unwrap()
}

#[test]
fn a_configuration_that_the_guest_refuses_is_no_plugin() {
    run(async {
        let rig = Rig::new(&guest(&format!("{LIFE} {PASS}"))).await;
        for _ in 0..3 {
            let mut filter = rig.filter_with("no").await;
            assert_eq!(filter.request(head(&[]), true).await, Err(Fault::NotLoaded));
            assert!(filter.take_request().is_some());
            let mut filter = rig.filter_with("yes").await;
            rig.request(&mut filter).await;
        }
        assert_eq!(counts(&rig)[..4], [1, 2, 2, 3], "it is asked once");
        let refused = r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 0))"#;
        let rig = Rig::new(&guest(&format!("{refused} {PASS}"))).await;
        for config in ["a", "a", "b"] {
            let mut filter = rig.filter_with(config).await;
            assert_eq!(filter.request(head(&[]), true).await, Err(Fault::NotLoaded));
        }
        assert_eq!(
            (rig.seen.called("start"), rig.seen.called("proxy_on_vm_start")),
            (1, 1)
        );
    });
}

#[test]
fn a_context_lingers_until_its_guest_is_done() {
    run(async {
        let lines = format!(
            r#"{LIFE} {PASS}
               (global $last (mut i32) (i32.const 0))
               (func (export "proxy_on_done") (param $id i32) (result i32)
                 (call $count @"done")
                 (global.set $last (local.get $id))
                 (call $ok (call $proxy_set_tick_period_milliseconds (i32.const 10)))
                 (i32.const 0))
               (func (export "proxy_on_tick") (param i32)
                 (if (i32.eqz (global.get $last)) (then (return)))
                 (call $ok (call $proxy_set_effective_context (global.get $last)))
                 ;; What was can still be read.
                 (call $value (i32.const 0) @":path")
                 (call $ok (call $proxy_done))
                 (if (i32.ne (call $proxy_done) (i32.const 1)) (then unreachable))
                 (global.set $last (i32.const 0)))"#
        );
        let rig = Rig::new(&guest(&lines)).await;
        rig.pass().await;
        becomes(|| counts(&rig)[4], 1).await;
        rig.until(|seen| seen.called("proxy_on_delete") == 1).await;
        assert_eq!(counts(&rig)[4..], [1, 1, 1]);
        becomes(|| contexts(&rig), 1).await;
    });
}

#[test]
fn contexts_that_linger_are_bounded() {
    run(async {
        let done = r#"(func (export "proxy_on_done") (param i32) (result i32) (i32.const 0))"#;
        let rig = Rig::new(&guest(&format!("{done} {PASS}"))).await;
        for _ in 0..1100 {
            rig.pass().await;
        }
        becomes(|| contexts(&rig), 1025).await;
    });
}

#[test]
fn no_context_is_left_behind() {
    run(async {
        let rig = Rig::new(&guest(&format!("{LIFE} {PASS}"))).await;
        let mut open = Vec::new();
        for n in 0..1000 {
            let mut filter = rig.filter().await;
            rig.request(&mut filter).await;
            if n % 3 == 0 {
                open.push(filter);
            }
        }
        becomes(|| contexts(&rig), 335).await;
        open.clear();
        becomes(|| contexts(&rig), 1).await;
        assert_eq!((counts(&rig)[3], counts(&rig)[6]), (1000, 1000));
    });
}

#[test]
fn root_contexts_are_bounded() {
    run(async {
        let rig = Rig::new(&guest(&format!("{LIFE} {PASS}"))).await;
        for n in 0..300 {
            let mut filter = rig.filter_with(&format!("c{n}")).await;
            rig.request(&mut filter).await;
        }
        becomes(|| contexts(&rig), 256).await;
        assert_eq!(rig.seen.called("start"), 1);
    });
}

#[test]
fn a_trap_in_any_callback_costs_its_machine_and_no_more() {
    let callbacks = [
        ("proxy_on_context_create", "(param i32 i32)", ""),
        (
            "proxy_on_vm_start",
            "(param i32 i32) (result i32)",
            "(i32.const 1)",
        ),
        (
            "proxy_on_configure",
            "(param i32 i32) (result i32)",
            "(i32.const 1)",
        ),
        (
            "proxy_on_request_headers",
            "(param i32 i32 i32) (result i32)",
            "(i32.const 0)",
        ),
        (
            "proxy_on_request_body",
            "(param i32 i32 i32) (result i32)",
            "(i32.const 0)",
        ),
        (
            "proxy_on_request_trailers",
            "(param i32 i32) (result i32)",
            "(i32.const 0)",
        ),
        (
            "proxy_on_response_headers",
            "(param i32 i32 i32) (result i32)",
            "(i32.const 0)",
        ),
        (
            "proxy_on_response_body",
            "(param i32 i32 i32) (result i32)",
            "(i32.const 0)",
        ),
        (
            "proxy_on_response_trailers",
            "(param i32 i32) (result i32)",
            "(i32.const 0)",
        ),
        ("proxy_on_done", "(param i32) (result i32)", "(i32.const 1)"),
        ("proxy_on_log", "(param i32)", ""),
        ("proxy_on_delete", "(param i32)", ""),
    ];
    run(async {
        for (bad, ..) in callbacks {
            let lines: String = callbacks
                .iter()
                .map(|(name, ty, result)| {
                    let trap = if *name == bad { "(call $trap)" } else { "" };
                    format!(r#"(func (export "{name}") {ty} {trap} {result})"#)
                })
                .collect();
            let rig = Rig::new(&guest(&format!("{ONCE} {lines}"))).await;
            for n in 0..2 {
                let mut faults = 0;
                let mut filter = rig.filter().await;
                match filter.request(head(&[("a", "1")]), false).await {
                    Ok(step) => assert_eq!(step, Step::Go),
                    Err(fault) => {
                        assert_eq!(fault, Fault::Trap);
                        faults += 1;
                    }
                }
                assert_eq!(value(&filter.take_request().unwrap().headers, "a"), "1");
                if faults == 0 {
                    faults += usize::from(filter.request_body(bytes("q"), false).await.is_err());
                    assert_eq!(filter.take_request_body(), "q");
                }
                if faults == 0 {
                    faults += usize::from(filter.request_trailers(fields(&[])).await.is_err());
                }
                if faults == 0 {
                    faults += usize::from(filter.response(answer(&[("a", "1")]), false).await.is_err());
                    assert_eq!(value(&filter.take_response().unwrap().headers, "a"), "1");
                }
                if faults == 0 {
                    faults += usize::from(filter.response_body(bytes("s"), false).await.is_err());
                    assert_eq!(filter.take_response_body(), "s");
                }
                if faults == 0 {
                    faults += usize::from(filter.response_trailers(fields(&[])).await.is_err());
                }
                drop(filter);
                let at_end = matches!(bad, "proxy_on_done" | "proxy_on_log" | "proxy_on_delete");
                assert_eq!(faults, usize::from(n == 0 && !at_end), "{bad}");
                let traps = || {
                    let calls = rig.seen.calls.borrow();
                    calls
                        .iter()
                        .filter(|(_, outcome)| outcome.is_err())
                        .copied()
                        .collect::<Vec<_>>()
                };
                // It is told once.
                becomes(traps, vec![(bad, Err(Fault::Trap))]).await;
            }
            assert_eq!(rig.seen.called("start"), 2, "{bad}");
        }
    });
}

#[test]
fn what_a_call_that_traps_has_changed_is_undone_and_all_in_the_machine_are_told() {
    run(async {
        let lines = format!(
            r#"{ONCE}
               (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                 (call $value (i32.const 0) @"do")
                 (call $note @"seen" (i32.const 1))
                 (call $ok (call $proxy_replace_header_map_value (i32.const 0) @":path" @"/changed"))
                 ;; t: trap, h: hold up, g: go.
                 (if (i32.eq (i32.load8_u (i32.load (i32.const 16))) (i32.const 116)) (then (call $trap)))
                 (i32.eq (i32.load8_u (i32.load (i32.const 16))) (i32.const 104)))
               (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const 0))
               (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
                 (call $ok (call $proxy_set_buffer_bytes (i32.const 0) (i32.const 0) (i32.const -1) @"changed"))
                 (i32.const 1))"#
        );
        let rig = Rig::new(&guest(&lines)).await;
        let mut held = rig.filter().await;
        assert_eq!(held.request(head(&[("do", "h")]), true).await, Ok(Step::Wait));
        let mut halfway = rig.filter().await;
        assert_eq!(halfway.request(head(&[("do", "g")]), false).await, Ok(Step::Go));
        assert_eq!(halfway.request_body(bytes("body"), false).await, Ok(Step::Wait));
        let mut gone = rig.filter().await;
        assert_eq!(gone.request(head(&[("do", "g")]), true).await, Ok(Step::Go));
        gone.take_request();
        let waiting =
            tokio::task::spawn_local(async move { (resumed(&mut held).await, held.take_request()) });
        tokio::task::yield_now().await;
        let mut bad = rig.filter().await;
        assert_eq!(bad.request(head(&[("do", "t")]), true).await, Err(Fault::Trap));
        let head = bad.take_request().unwrap();
        assert_eq!((head.path.as_str(), value(&head.headers, "seen")), ("/p?q=1", ""));
        // What others had changed in calls that went well holds.
        let (resumed, head) = waiting.await.unwrap();
        assert_eq!(resumed, Err(Fault::Trap));
        let head = head.unwrap();
        assert_eq!(
            (head.path.as_str(), value(&head.headers, "seen")),
            ("/changed", "1")
        );
        assert_eq!(halfway.request_body(bytes("more"), true).await, Err(Fault::Trap));
        assert_eq!(halfway.take_request_body(), "changedmore");
        assert_eq!(gone.response(answer(&[("x", "1")]), true).await, Err(Fault::Trap));
        assert_eq!(value(&gone.take_response().unwrap().headers, "x"), "1");
        // The next begins anew.
        let mut next = rig.filter().await;
        assert_eq!(next.request(rig::head(&[("do", "t")]), true).await, Ok(Step::Go));
        drop((bad, halfway, gone, next));
        becomes(|| contexts(&rig), 1).await;
    });
}

#[test]
fn every_bound_is_kept() {
    run(async {
        let on = |lines: &str| {
            guest(&format!(
                r#"(func $deep (call $deep) (call $deep))
                   (table $t 1 funcref)
                   (func (export "proxy_on_request_headers") (param $id i32) (param i32 i32) (result i32)
                     {lines} (i32.const 0))"#
            ))
        };
        for (lines, want) in [
            ("(loop $for_ever (br $for_ever))", Fault::Time),
            // A flood of calls of the host.
            (
                r#"(loop $for_ever (drop (call $proxy_log (i32.const 2) @"x")) (br $for_ever))"#,
                Fault::Time,
            ),
            (
                "(loop $more (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable",
                Fault::Memory,
            ),
            ("(call $deep)", Fault::Trap),
            (
                "(if (i32.eq (table.grow (ref.null func) (i32.const 30000)) (i32.const -1)) (then unreachable))",
                Fault::Memory,
            ),
        ] {
            let limits = |limits: &mut PluginLimits| limits.call_timeout = Duration::from_millis(50);
            let rig = Rig::with(&on(lines), spec(|spec| limits(&mut spec.limits))).await;
            for _ in 0..2 {
                let mut filter = rig.filter().await;
                assert_eq!(filter.request(head(&[]), true).await, Err(want), "{lines}");
            }
        }
    });
}

#[test]
fn log_lines_are_bounded() {
    run(async {
        let lines = r#"
          (func (export "proxy_on_request_headers") (param $id i32) (param i32 i32) (result i32) (local $n i32)
            (loop $more
              (call $ok (call $proxy_log (i32.const 3) @"a line"))
              (local.set $n (i32.add (local.get $n) (i32.const 1)))
              (br_if $more (i32.lt_u (local.get $n) (i32.const 20))))
            (i32.const 0))"#;
        let rig = Rig::named("chatty", &guest(lines), spec(|spec| spec.limits.log_lines = 7)).await;
        rig.pass().await;
        rig.pass().await;
        let (kept, _) = leeward_wasm::log_lines(Some("chatty"));
        assert_eq!(kept.len(), 14);
        assert_eq!(&*kept[0].text, "a line");
    });
}

#[test]
fn a_guest_that_runs_and_runs_holds_nobody_else_up() {
    run(async {
        let lines = r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                         (loop $for_ever (br $for_ever)) (i32.const 0))"#;
        let limits =
            |spec: &mut leeward_policy::model::Plugin| spec.limits.call_timeout = Duration::from_secs(1);
        let rig = Rig::with(&guest(lines), spec(limits)).await;
        let mut ticks = 0;
        let mut filter = rig.filter().await;
        let called = tokio::select! {
            biased;
            called = filter.request(head(&[]), true) => called,
            () = async { loop { tokio::time::sleep(Duration::from_millis(1)).await; ticks += 1; } } => unreachable!(),
        };
        assert_eq!(called, Err(Fault::Time));
        assert!(ticks >= 10, "only {ticks} ticks in a second");
    });
}

#[test]
fn what_others_do_meanwhile_is_not_held_against_a_guest() {
    run(async {
        // Some 30 ms of work, at the end of each of which others have the worker for longer than it may take in all.
        let lines = r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (local $n i64)
                         (local.set $n (i64.const 100000000))
                         (loop $more
                           (local.set $n (i64.sub (local.get $n) (i64.const 1)))
                           (br_if $more (i64.ne (local.get $n) (i64.const 0))))
                         (i32.const 0))"#;
        let limits =
            |spec: &mut leeward_policy::model::Plugin| spec.limits.call_timeout = Duration::from_secs(2);
        let rig = Rig::with(&guest(lines), spec(limits)).await;
        let turns = std::rc::Rc::new(std::cell::Cell::new(0));
        let taken = std::rc::Rc::clone(&turns);
        let other = tokio::task::spawn_local(async move {
            while taken.get() < 5 {
                taken.set(taken.get() + 1);
                std::thread::sleep(Duration::from_millis(500));
                tokio::task::yield_now().await;
            }
        });
        rig.pass().await;
        assert_eq!(turns.get(), 5, "it has met the clock at least that often");
        other.await.unwrap();
    });
}

#[test]
fn a_machine_that_is_replaced_ends_without_a_request() {
    run(async {
        let rig = Rig::new(&guest(&format!("{LIFE} {PASS}"))).await;
        let filter = {
            let mut filter = rig.filter().await;
            rig.request(&mut filter).await;
            filter
        };
        let instances = || rig.host.report(now()).remove(0).instances;
        assert_eq!(instances(), 1);
        load(&rig.host, &rig.spec, &guest(PASS)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(instances(), 1, "it has a request");
        drop(filter);
        becomes(instances, 0).await;
        // So does one whose plugin policy has forgotten.
        let deleted = rig.seen.called("proxy_on_delete");
        load(&rig.host, &rig.spec, &guest(&format!("{LIFE} {PASS}")))
            .await
            .unwrap();
        rig.pass().await;
        rig.host.retain(&[]);
        rig.until(|seen| seen.called("proxy_on_delete") == deleted + 2)
            .await;
    });
}

#[test]
fn a_context_that_cannot_be_made_leaves_nothing_behind() {
    run(async {
        let lines = format!(
            r#"{PASS}
               (func (export "proxy_on_context_create") (param i32) (param $root i32)
                 (if (local.get $root) (then unreachable)))"#
        );
        let rig = Rig::new(&guest(&lines)).await;
        for _ in 0..3 {
            let mut filter = rig.filter().await;
            assert_eq!(filter.request(head(&[]), true).await, Err(Fault::Trap));
            assert!(filter.take_request().is_some());
        }
        let text = format!("{:?}", rig.worker);
        assert!(text.contains("lost: 0"), "{text}");
    });
}

#[test]
fn an_answer_waits_for_its_turn_though_its_request_has_no_time_left() {
    run(async {
        let lines = r#"
          (func $slow (local $n i64)
            (local.set $n (i64.const 30000000))
            (loop $more
              (local.set $n (i64.sub (local.get $n) (i64.const 1)))
              (br_if $more (i64.ne (local.get $n) (i64.const 0)))))
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (call $value (i32.const 0) @"slow")
            (if (i32.load (i32.const 20)) (then (call $slow)))
            (i32.const 0))
          (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const 0))"#;
        let rig = Rig::with(
            &guest(lines),
            spec(|spec| spec.limits.call_timeout = Duration::from_secs(60)),
        )
        .await;
        let chosen = rig.worker.choose(&rig.name, &rig.spec, false).unwrap();
        let mut facts = rig::facts("");
        facts.deadline = Some(now() + Duration::from_secs(5));
        let mut late = rig.worker.filter(&chosen, facts.clone()).await.unwrap();
        assert_eq!(late.request(head(&[("slow", "")]), true).await, Ok(Step::Go));
        assert!(late.take_request().is_some());
        tokio::time::sleep_until((facts.deadline.unwrap() + Duration::from_millis(1)).into()).await;
        let mut slow = rig.filter().await;
        let (first, answered) = tokio::join!(
            biased;
            slow.request(head(&[("slow", "1")]), true),
            late.response(answer(&[]), true)
        );
        assert_eq!((first, answered), (Ok(Step::Go), Ok(Step::Go)));
    });
}

#[test]
fn what_a_guest_says_when_nobody_waits_is_heard() {
    run(async {
        // It refuses the first of the body, in a turn that takes long.
        let lines = r#"
          (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))
          (func (export "proxy_on_request_body") (param i32) (param $len i32) (param i32) (result i32) (local $n i64)
            (if (i32.ne (local.get $len) (i32.const 1)) (then (return (i32.const 0))))
            (local.set $n (i64.const 30000000))
            (loop $more
              (local.set $n (i64.sub (local.get $n) (i64.const 1)))
              (br_if $more (i64.ne (local.get $n) (i64.const 0))))
            (call $ok (call $proxy_send_local_response
              (i32.const 403) @"" @"no" (i32.const 0) (i32.const 0) (i32.const -1)))
            (i32.const 1))"#;
        let rig = Rig::with(
            &guest(lines),
            spec(|spec| spec.limits.call_timeout = Duration::from_secs(60)),
        )
        .await;
        let mut filter = rig.filter().await;
        assert_eq!(filter.request(head(&[]), false).await, Ok(Step::Go));
        tokio::select! {
            biased;
            _ = filter.request_body(bytes("a"), false) => panic!("it isn't slow"),
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
        // Others aren't held up by that it isn't waited for.
        rig.pass().await;
        let step = filter.request_body(bytes("b"), true).await;
        assert!(
            matches!(&step, Ok(Step::Respond(reply)) if reply.status == 403),
            "{step:?}"
        );
    });
}

#[test]
fn who_loses_interest_in_the_middle_of_a_call_breaks_nothing() {
    run(async {
        let lines = format!(
            r#"{LIFE}
               (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (local $n i64)
                 (call $value (i32.const 0) @"slow")
                 (if (i32.load (i32.const 20)) (then
                   (call $count @"slow")
                   (local.set $n (i64.const 30000000))
                   (loop $more
                     (local.set $n (i64.sub (local.get $n) (i64.const 1)))
                     (br_if $more (i64.ne (local.get $n) (i64.const 0))))
                   (call $count @"through")))
                 (i32.const 0))"#
        );
        let rig = Rig::with(
            &guest(&lines),
            spec(|spec| spec.limits.call_timeout = Duration::from_secs(60)),
        )
        .await;
        let mut open = rig.filter().await;
        assert_eq!(open.request(head(&[("slow", "")]), true).await, Ok(Step::Go));
        let mut slow = rig.filter().await;
        tokio::select! {
            biased;
            _ = slow.request(head(&[("slow", "1")]), true) => panic!("it isn't slow"),
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
        drop(slow);
        // It comes to its end all the same, and the machine is the same for everybody.
        rig.until(|seen| seen.counts.borrow().get("through") == Some(&1))
            .await;
        let mut other = rig.filter().await;
        assert_eq!(other.request(head(&[("slow", "")]), true).await, Ok(Step::Go));
        drop((open, other));
        rig.until(|seen| seen.called("proxy_on_delete") == 3).await;
        assert_eq!(rig.seen.called("start"), 1);
        assert_eq!(rig.seen.counts.borrow()["through"], 1);
        becomes(|| contexts(&rig), 1).await;
    });
}

#[test]
fn who_waits_too_long_for_a_turn_is_told_that_it_is_busy() {
    run(async {
        let lines = r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
                         (loop $for_ever (br $for_ever)) (i32.const 0))"#;
        let rig = Rig::with(
            &guest(lines),
            spec(|spec| spec.limits.call_timeout = Duration::from_secs(60)),
        )
        .await;
        let mut first = rig.filter().await;
        let chosen = rig.worker.choose(&rig.name, &rig.spec, false).unwrap();
        let mut facts = rig::facts("");
        facts.deadline = Some(now() + Duration::from_millis(20));
        let mut second = rig.worker.filter(&chosen, facts).await.unwrap();
        tokio::select! {
            biased;
            _ = first.request(head(&[]), true) => panic!("it ends"),
            busy = second.request(head(&[("a", "1")]), true) => assert_eq!(busy, Err(Fault::Busy)),
        }
        assert_eq!(value(&second.take_request().unwrap().headers, "a"), "1");
    });
}

#[test]
fn a_guest_ticks_until_it_says_otherwise_or_is_replaced() {
    run(async {
        let lines = format!(
            r#"{LIFE} {PASS}
               (func (export "proxy_on_tick") (param $root i32) (call $count @"tick"))
               (func (export "proxy_on_done") (param i32) (result i32) (call $count @"done") (i32.const 1))
               (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
                 (call $ok (call $proxy_set_tick_period_milliseconds (i32.const 0)))
                 (i32.const 0))
               (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
                 (call $ok (call $proxy_set_tick_period_milliseconds (i32.const 10)))
                 (i32.const 0))"#
        );
        let rig = Rig::new(&guest(&lines)).await;
        let mut filter = rig.filter().await;
        rig.request(&mut filter).await;
        filter.request_body(bytes("a"), true).await.unwrap();
        rig.until(|seen| seen.called("proxy_on_tick") >= 3).await;
        filter.response(answer(&[]), true).await.unwrap();
        let ticks = rig.seen.called("proxy_on_tick");
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(
            rig.seen.called("proxy_on_tick"),
            ticks,
            "it has been told to stop"
        );
        // Another module: the old one ends when its last request does.
        filter.request_body(bytes("a"), true).await.unwrap();
        load(&rig.host, &rig.spec, &guest(PASS)).await.unwrap();
        rig.pass().await;
        let ticks = rig.seen.called("proxy_on_tick");
        rig.until(|seen| seen.called("proxy_on_tick") > ticks).await;
        let deleted = rig.seen.called("proxy_on_delete");
        drop(filter);
        rig.until(|seen| seen.called("proxy_on_delete") == deleted + 2)
            .await;
        let ticks = rig.seen.called("proxy_on_tick");
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(rig.seen.called("proxy_on_tick"), ticks, "it is gone");
    });
}
