//! Does what the request's field x-do says: acts, separated by "; ", each of a phase (req, body, res, rbody), a word, and
//! what it is about. What an edit is refused for is told in the header x-refused, or the body.

use leeward::plugin::host;
use leeward::plugin::passing::{BodyMode, EditError, Interest};
use leeward::plugin::types::{Header, Response};

wit_bindgen::generate!({ path: "../../../../../plugins/wit", world: "filter", generate_all });

struct Probe;

/// The acts of a phase.
fn acts(request: &RequestHead, phase: &str) -> Vec<Vec<String>> {
    let text = request
        .header("x-do")
        .first()
        .map(|v| String::from_utf8_lossy(v).into_owned());
    text.unwrap_or_default()
        .split("; ")
        .map(|act| act.split(' ').map(str::to_owned).collect::<Vec<_>>())
        .filter(|act| act[0] == phase)
        .collect()
}

fn respond(act: &[String]) -> Response {
    Response {
        status: act[2].parse().unwrap(),
        headers: Vec::<Header>::new(),
        body: act.get(3).cloned().unwrap_or_default().into_bytes(),
    }
}

fn mode(word: &str) -> BodyMode {
    match word {
        "pieces" => BodyMode::Pieces,
        "whole" => BodyMode::Whole,
        _ => BodyMode::None,
    }
}

/// What any phase may do.
fn always(request: &RequestHead, act: &[String]) -> Option<Result<(), EditError>> {
    let word = act[1].as_str();
    let arg = |at: usize| act.get(at).map_or("", String::as_str);
    Some(match word {
        "trap" => panic!("as told"),
        "loop" => loop {
            std::hint::black_box(word);
        },
        "sleep" => {
            wasip2::clocks::monotonic_clock::subscribe_duration(arg(2).parse::<u64>().unwrap() * 1_000_000)
                .block();
            Ok(())
        }
        "set" => request.set_header(arg(2), &arg(3).replace("CRLF", "\r\n").into_bytes()),
        "add" => request.add_header(arg(2), arg(3).as_bytes()),
        "fill" => {
            let filled = (0..200).try_for_each(|n| request.add_header(&format!("x-fill-{n}"), b"1"));
            request.remove_header("x-fill-0").and(filled)
        }
        "large" => request.set_header("x-large", &vec![b'a'; 65 << 10]),
        "remove" => request.remove_header(arg(2)),
        "path" => request.set_path(arg(2)),
        "copy" => {
            let value = request.header(arg(2)).concat();
            request.set_header(arg(3), &value)
        }
        "tell" => {
            let told = format!(
                "{} {} {:?} {} {} {} {} {:?} {} {}",
                request.method(),
                request.path(),
                request.query(),
                request.authority(),
                request.service(),
                request.route(),
                request.zone(),
                request.peer(),
                request.config(),
                request.headers().len(),
            );
            request.set_header("x-told", told.as_bytes())
        }
        "note" => {
            assert!(request.set_note(arg(2), arg(3).as_bytes()));
            Ok(())
        }
        "notes" => {
            let kept = (0..20)
                .filter(|n| request.set_note(&n.to_string(), &[0; 10]))
                .count();
            let large = request.set_note("0", &[0; 17 << 10]);
            request.set_header("x-notes", format!("{kept} {large}").as_bytes())
        }
        "flag" => {
            let value = format!("{:?}", host::flag(arg(2)));
            request.set_header("x-flag", value.as_bytes())
        }
        _ => return None,
    })
}

impl Guest for Probe {
    fn on_request(request: &RequestHead) -> RequestVerdict {
        let mut interest = Interest {
            request_body: BodyMode::None,
            response: false,
        };
        let mut refused = Vec::new();
        for act in acts(request, "req") {
            match act[1].as_str() {
                "body" => interest.request_body = mode(&act[2]),
                "response" => interest.response = true,
                "respond" => return RequestVerdict::Respond(respond(&act)),
                _ => {
                    if let Some(Err(error)) = always(request, &act) {
                        refused.push(format!("{error:?}"));
                    }
                }
            }
        }
        if !refused.is_empty() {
            request
                .set_header("x-refused", refused.join(",").as_bytes())
                .unwrap();
        }
        RequestVerdict::Proceed(interest)
    }

    fn on_request_body(request: &RequestHead, data: Vec<u8>, end: bool) -> BodyVerdict {
        for act in acts(request, "body") {
            match act[1].as_str() {
                "upper" => return BodyVerdict::Replace(data.to_ascii_uppercase()),
                "swallow" => return BodyVerdict::Replace(Vec::new()),
                "ends" => return BodyVerdict::Replace(format!("[{} {end}]", data.len()).into_bytes()),
                "respond" => return BodyVerdict::Respond(respond(&act)),
                _ => {
                    if let Some(Err(error)) = always(request, &act) {
                        return BodyVerdict::Replace(format!("{error:?}").into_bytes());
                    }
                }
            }
        }
        BodyVerdict::Pass
    }

    fn on_response(request: &RequestHead, response: &ResponseHead) -> ResponseVerdict {
        let mut body = BodyMode::None;
        let mut refused = Vec::new();
        for act in acts(request, "res") {
            let arg = |at: usize| act.get(at).map_or("", String::as_str);
            let edited = match act[1].as_str() {
                "body" => {
                    body = mode(&act[2]);
                    continue;
                }
                "respond" => return ResponseVerdict::Respond(respond(&act)),
                "rset" => response.set_header(arg(2), arg(3).as_bytes()),
                "rremove" => response.remove_header(arg(2)),
                "status" => response.set_status(arg(2).parse().unwrap()),
                "rnote" => response.set_header("x-note", &request.note(arg(2)).unwrap_or_default()),
                "rtell" => {
                    let told = format!(
                        "{} {} {}",
                        response.status(),
                        response.headers().len(),
                        request.path()
                    );
                    response.set_header("x-told", told.as_bytes())
                }
                _ => always(request, &act).unwrap(),
            };
            if let Err(error) = edited {
                refused.push(format!("{error:?}"));
            }
        }
        if !refused.is_empty() {
            response
                .set_header("x-refused", refused.join(",").as_bytes())
                .unwrap();
        }
        ResponseVerdict::Proceed(body)
    }

    fn on_response_body(
        request: &RequestHead,
        response: &ResponseHead,
        data: Vec<u8>,
        end: bool,
    ) -> BodyVerdict {
        for act in acts(request, "rbody") {
            match act[1].as_str() {
                "upper" => return BodyVerdict::Replace(data.to_ascii_uppercase()),
                "ends" => return BodyVerdict::Replace(format!("[{} {end}]", data.len()).into_bytes()),
                "respond" => return BodyVerdict::Respond(respond(&act)),
                "rset" => {
                    if let Err(error) = response.set_header(&act[2], act[3].as_bytes()) {
                        return BodyVerdict::Replace(format!("{error:?}").into_bytes());
                    }
                }
                _ => {
                    let _ = always(request, &act);
                }
            }
        }
        BodyVerdict::Pass
    }
}

export!(Probe);
