//! Guests in text, around a few lines of their own.

use std::fmt::Write as _;

/// The host's functions with their parameters: "i" has 32 bits, "l" 64. All answer with a status.
pub const IMPORTS: [(&str, &str); 43] = [
    ("proxy_log", "iii"),
    ("proxy_get_log_level", "i"),
    ("proxy_get_current_time_nanoseconds", "i"),
    ("proxy_set_tick_period_milliseconds", "i"),
    ("proxy_get_buffer_bytes", "iiiii"),
    ("proxy_get_buffer_status", "iii"),
    ("proxy_set_buffer_bytes", "iiiii"),
    ("proxy_get_header_map_pairs", "iii"),
    ("proxy_set_header_map_pairs", "iii"),
    ("proxy_get_header_map_size", "ii"),
    ("proxy_get_header_map_value", "iiiii"),
    ("proxy_add_header_map_value", "iiiii"),
    ("proxy_replace_header_map_value", "iiiii"),
    ("proxy_remove_header_map_value", "iii"),
    ("proxy_get_property", "iiii"),
    ("proxy_set_property", "iiii"),
    ("proxy_get_shared_data", "iiiii"),
    ("proxy_set_shared_data", "iiiii"),
    ("proxy_register_shared_queue", "iii"),
    ("proxy_resolve_shared_queue", "iiiii"),
    ("proxy_dequeue_shared_queue", "iii"),
    ("proxy_enqueue_shared_queue", "iii"),
    ("proxy_continue_stream", "i"),
    ("proxy_close_stream", "i"),
    ("proxy_send_local_response", "iiiiiiii"),
    ("proxy_http_call", "iiiiiiiiii"),
    ("proxy_grpc_call", "iiiiiiiiiiii"),
    ("proxy_grpc_stream", "iiiiiiiii"),
    ("proxy_grpc_send", "iiii"),
    ("proxy_grpc_cancel", "i"),
    ("proxy_grpc_close", "i"),
    ("proxy_get_status", "iii"),
    ("proxy_set_effective_context", "i"),
    ("proxy_call_foreign_function", "iiiiii"),
    ("proxy_done", ""),
    ("proxy_define_metric", "iiii"),
    ("proxy_get_metric", "ii"),
    ("proxy_record_metric", "il"),
    ("proxy_increment_metric", "il"),
    // Of version 0.1.0 only.
    ("proxy_get_configuration", "ii"),
    ("proxy_continue_request", ""),
    ("proxy_continue_response", ""),
    ("proxy_clear_route_cache", ""),
];

/// What every guest has: memory by the yard, and a few ways to say things shortly.
///
/// - `$note NAME VALUE` sets a field of the request to a number; `$note2` one of the answer.
/// - `$gauge NAME VALUE` sets a gauge, which can be seen from outside everywhere.
/// - `$value MAP NAME` has the value of a field: where it is at 16, how long at 20.
const COMMON: &str = r#"
  (memory (export "memory") 4)
  (global $heap (mut i32) (i32.const 131072))
  (func (export "proxy_on_memory_allocate") (param $len i32) (result i32) (local $at i32)
    (local.set $at (global.get $heap))
    (global.set $heap (i32.add (global.get $heap) (i32.and (i32.add (local.get $len) (i32.const 15)) (i32.const -8))))
    (block $fits
      (br_if $fits (i32.lt_u (global.get $heap) (i32.mul (memory.size) (i32.const 65536))))
      (drop (memory.grow (i32.add (i32.const 1) (i32.div_u (local.get $len) (i32.const 65536))))))
    (local.get $at))
  (func $decimal (param $n i32) (result i32 i32) (local $at i32)
    (local.set $at (i32.const 80))
    (loop $digits
      (local.set $at (i32.sub (local.get $at) (i32.const 1)))
      (i32.store8 (local.get $at) (i32.add (i32.const 48) (i32.rem_u (local.get $n) (i32.const 10))))
      (local.set $n (i32.div_u (local.get $n) (i32.const 10)))
      (br_if $digits (local.get $n)))
    (local.get $at) (i32.sub (i32.const 80) (local.get $at)))
  (func $note (param $name i32) (param $len i32) (param $n i32)
    (call $proxy_replace_header_map_value (i32.const 0) (local.get $name) (local.get $len) (call $decimal (local.get $n)))
    (call $ok))
  (func $note2 (param $name i32) (param $len i32) (param $n i32)
    (call $proxy_replace_header_map_value (i32.const 2) (local.get $name) (local.get $len) (call $decimal (local.get $n)))
    (call $ok))
  (func $gauge (param $name i32) (param $len i32) (param $n i32)
    (call $ok (call $proxy_define_metric (i32.const 1) (local.get $name) (local.get $len) (i32.const 8)))
    (call $ok (call $proxy_record_metric (i32.load (i32.const 8)) (i64.extend_i32_u (local.get $n)))))
  (func $value (param $map i32) (param $name i32) (param $len i32)
    (call $ok
      (call $proxy_get_header_map_value
        (local.get $map) (local.get $name) (local.get $len) (i32.const 16) (i32.const 20))))
  (func $got (result i32 i32) (i32.load (i32.const 16)) (i32.load (i32.const 20)))
  (func $ok (param $status i32) (if (local.get $status) (then unreachable)))
"#;

/// Passes everything on.
pub const PASS: &str =
    r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))"#;

/// Traps once in the life of the process, in the callback that has `$trap` in it.
pub const ONCE: &str = r#"
  (func $trap
    (call $ok (call $proxy_define_metric (i32.const 0) @"traps" (i32.const 8)))
    (call $ok (call $proxy_get_metric (i32.load (i32.const 8)) (i32.const 32)))
    (if (i64.ne (i64.load (i32.const 32)) (i64.const 0)) (then (return)))
    (call $ok (call $proxy_increment_metric (i32.load (i32.const 8)) (i64.const 1)))
    unreachable)
"#;

/// A module of version 0.2.1: `lines`, and around them what every guest has. `@"text"` is where the text is and how long.
pub fn guest(lines: &str) -> Vec<u8> {
    version("proxy_abi_version_0_2_1", lines)
}

/// The same of another version.
pub fn version(version: &str, lines: &str) -> Vec<u8> {
    let mut text = "(module\n".to_owned();
    for (name, params) in IMPORTS {
        // Linkers leave out what isn't called.
        if !format!("{COMMON}{lines}").contains(&format!("${name}")) {
            continue;
        }
        let params: Vec<_> = params
            .chars()
            .map(|c| if c == 'l' { "i64" } else { "i32" })
            .collect();
        let params = params.join(" ");
        writeln!(
            text,
            "(import \"env\" \"{name}\" (func ${name} (param {params}) (result i32)))"
        )
        .unwrap();
    }
    writeln!(text, "{COMMON}\n(func (export \"{version}\"))").unwrap();
    let (mut at, mut data) = (1024, String::new());
    let mut rest = lines;
    while let Some((before, after)) = rest.split_once("@\"") {
        let (literal, after) = after.split_once('"').unwrap();
        let len = length(literal);
        write!(text, "{before}(i32.const {at}) (i32.const {len})").unwrap();
        writeln!(data, "(data (i32.const {at}) \"{literal}\")").unwrap();
        at += len + 1;
        rest = after;
    }
    writeln!(text, "{rest}\n{data})").unwrap();
    wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Bytes of a literal, in which `\hh` is one.
fn length(literal: &str) -> usize {
    literal.len() - 2 * literal.matches('\\').count()
}

/// Pairs of fields as a literal.
pub fn pairs(pairs: &[(&str, &str)]) -> String {
    let mut bytes = u32::try_from(pairs.len()).unwrap().to_le_bytes().to_vec();
    for (name, value) in pairs {
        for text in [name, value] {
            bytes.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
        }
    }
    for (name, value) in pairs {
        for text in [name, value] {
            bytes.extend(text.as_bytes());
            bytes.push(0);
        }
    }
    bytes.iter().fold(String::new(), |mut literal, byte| {
        write!(literal, "\\{byte:02x}").unwrap();
        literal
    })
}
