//! Detect: what a connection speaks, by its first bytes.

use std::sync::Arc;
use tokio_rustls::rustls::server::Acceptor;

/// First bytes that are looked at, at most; what hasn't shown by then what it is, is bytes.
pub(crate) const LOOK_AT: usize = 16 << 10;
/// What an HTTP/2 client with prior knowledge begins with (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest name of a method that is looked for; the longest registered one has 17 letters.
const LONGEST_METHOD: usize = 24;
/// A TLS record with a handshake message (RFC 8446 §5.1).
const HANDSHAKE: u8 = 22;

/// What first bytes show.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Shows {
    Http1,
    Http2,
    /// TLS, with the server name in its ClientHello.
    Tls(Option<Arc<str>>),
    /// None of these.
    Bytes,
    /// Nothing yet.
    More,
}

/// Looks at all bytes that have come yet.
pub(crate) fn look(bytes: &[u8]) -> Shows {
    let is_all = bytes.len() >= LOOK_AT;
    let shows = match bytes {
        [] => Shows::More,
        [HANDSHAKE, ..] => tls(bytes),
        _ if bytes.starts_with(PREFACE) => Shows::Http2,
        _ if PREFACE.starts_with(bytes) => Shows::More,
        _ => http1(bytes, is_all),
    };
    if is_all && shows == Shows::More {
        return Shows::Bytes;
    }
    shows
}

/// A request line (RFC 9112 §3), whole, or, if it is longer than what is looked at, as far as it goes.
fn http1(bytes: &[u8], is_all: bool) -> Shows {
    let method = bytes
        .iter()
        .take(LONGEST_METHOD + 1)
        .take_while(|b| is_token(**b));
    let method = method.count();
    match bytes.get(method) {
        None if method <= LONGEST_METHOD => return Shows::More,
        Some(b' ') if method > 0 => {}
        Some(_) | None => return Shows::Bytes,
    }
    let rest = bytes.get(method + 1..).unwrap_or_default();
    let Some(end) = rest.iter().position(|b| *b == b'\n') else {
        let plain = rest.iter().all(|b| *b == b'\r' || !b.is_ascii_control());
        return match (plain, is_all) {
            (false, _) => Shows::Bytes,
            (true, false) => Shows::More,
            (true, true) => Shows::Http1,
        };
    };
    let line = rest.get(..end).unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0") {
        Shows::Http1
    } else {
        Shows::Bytes
    }
}

/// RFC 9110 §5.6.2.
const fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric()
        || matches!(
            b,
            b'!' | b'#'
                | b'$'
                | b'%'
                | b'&'
                | b'\''
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'^'
                | b'_'
                | b'`'
                | b'|'
                | b'~'
        )
}

/// A ClientHello, which may come in several records.
fn tls(bytes: &[u8]) -> Shows {
    let mut acceptor = Acceptor::default();
    let mut left = bytes;
    loop {
        match acceptor.read_tls(&mut left) {
            Ok(0) => return Shows::More,
            Ok(_) => {}
            Err(_) => return Shows::Tls(None),
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let name = accepted.client_hello().server_name().map(Arc::from);
                return Shows::Tls(name);
            }
            Ok(None) => {}
            // What begins like TLS and can't be read is for its server to judge.
            Err(_) => return Shows::Tls(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio_rustls::rustls::pki_types::ServerName;
    use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, crypto};

    fn hello(name: &str) -> Vec<u8> {
        let provider = Arc::new(crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn http_is_known_by_its_first_line() {
        for line in [
            "GET / HTTP/1.1\r\n",
            "GET / HTTP/1.0\n",
            "PROPFIND /a b HTTP/1.1\r\nHost: x",
            "CUSTOM-METHOD * HTTP/1.1\r\n",
        ] {
            assert_eq!(look(line.as_bytes()), Shows::Http1, "{line:?}");
        }
        assert_eq!(look(PREFACE), Shows::Http2);
        let long = format!("GET /{}", "a".repeat(LOOK_AT));
        assert_eq!(look(&long.as_bytes()[..LOOK_AT]), Shows::Http1);
    }

    #[test]
    fn what_is_no_http_is_bytes() {
        for bytes in [
            &b"EHLO mail.example\r\n"[..],
            b"PING\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"GET / HTTP/2.0\r\n",
            b"GET\x00/",
            b"GET /\x01",
            b" GET / HTTP/1.1\r\n",
            b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
            b"SSH-2.0-OpenSSH_9\r\n",
            b"AVERYLONGWORDTHATISNOMETHOD",
        ] {
            assert_eq!(look(bytes), Shows::Bytes, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn the_server_name_is_read_however_the_hello_is_cut() {
        let hello = hello("db.example");
        let want = Shows::Tls(Some("db.example".into()));
        assert_eq!(look(&hello), want);
        for n in 0..hello.len() {
            assert_eq!(look(&hello[..n]), Shows::More, "{n} bytes");
        }
        // In two records (RFC 8446 §5.1).
        let (first, second) = hello[5..].split_at(20);
        let record = |part: &[u8]| [&[22, 3, 1, 0, u8::try_from(part.len() & 255).unwrap()], part].concat();
        if second.len() < 256 {
            assert_eq!(look(&[record(first), record(second)].concat()), want);
        }
        assert_eq!(
            look(&self::hello("10.0.0.1")),
            Shows::Tls(None),
            "an address is no name"
        );
        assert_eq!(look(b"\x16\x03\x01\x00\x04nope"), Shows::Tls(None));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_taken_for_something(bytes: Vec<u8>) {
            look(&bytes);
            look(&[&[HANDSHAKE, 3, 1][..], &bytes].concat());
        }

        #[test]
        fn what_is_known_stays_known(method in "[A-Z]{1,12}", path in "/[a-z/]{0,40}", more in "[ -~]{0,20}") {
            let whole = format!("{method} {path} HTTP/1.1\r\n{more}");
            let known = whole.find('\n').unwrap() + 1;
            for n in 0..=whole.len() {
                let shows = look(&whole.as_bytes()[..n]);
                prop_assert_eq!(shows, if n < known { Shows::More } else { Shows::Http1 });
            }
        }
    }
}
