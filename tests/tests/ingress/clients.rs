//! Other people's clients: curl, and aioquic for HTTP/3. Where one isn't there its test leaves itself out, unless
//! `LEEWARD_TEST_CURL` or `LEEWARD_TEST_AIOQUIC` is set.

use crate::kit::{Rig, SOON};
use anyhow::{Context, ensure};
use leeward_testkit::eventually;
use std::process::Output;
use tokio::process::Command;

async fn run(command: &mut Command) -> anyhow::Result<Output> {
    let ended = tokio::time::timeout(SOON, command.kill_on_drop(true).output()).await;
    Ok(ended.with_context(|| format!("{command:?} doesn't end"))??)
}

/// Whether a client is there; says so if its test is left out.
async fn is_there(required: &str, what: &str, mut probe: Command) -> bool {
    let there = run(&mut probe).await.is_ok_and(|output| output.status.success());
    if !there {
        assert!(
            std::env::var_os(required).is_none(),
            "{required} is set, and there is no {what}"
        );
        eprintln!("left out: there is no {what}; {required}=1 makes that a failure");
    }
    there
}

async fn rig() -> anyhow::Result<Rig> {
    let rig = Rig::start().await?;
    rig.certify("shop", &["shop.example"])?;
    rig.put("ca.crt", &rig.ca.pem)?;
    rig.open(&[rig.https("https", "shop", "http3: true")], &["shop.example"])
        .await?;
    eventually("HTTP/3", SOON, || async {
        let told = rig.get("shop.example", "/").await?;
        ensure!(told.headers.contains_key("alt-svc"), "{told:?}");
        Ok(())
    })
    .await?;
    Ok(rig)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_gets_what_it_asks_for() -> anyhow::Result<()> {
    let mut probe = Command::new("curl");
    probe.arg("--version");
    if !is_there("LEEWARD_TEST_CURL", "curl", probe).await {
        return Ok(());
    }
    let rig = rig().await?;
    let port = rig.address().port();
    for (flag, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let mut curl = Command::new("curl");
        curl.args(["-sS", flag, "--cacert"])
            .arg(rig.certificates.join("ca.crt"))
            .arg("--resolve")
            .arg(format!("shop.example:{port}:127.0.0.1"))
            .args([
                "-D",
                "-",
                "-w",
                "\nversion=%{http_version} status=%{response_code}",
            ])
            .arg(format!("https://shop.example:{port}/curl"));
        let output = run(&mut curl).await?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{output:?}");
        assert!(
            text.contains(&format!("version={version} status=200")),
            "{flag}: {text}"
        );
        assert!(text.contains(&format!("h3=\":{port}\"")), "{flag}: {text}");
    }
    Ok(())
}

/// GET and POST by aioquic; prints what came.
const SCRIPT: &str = r#"
import asyncio, ssl, sys
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration

port, ca = int(sys.argv[1]), sys.argv[2]

class Client(QuicConnectionProtocol):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.http = H3Connection(self._quic)
        self.answers = {}

    def quic_event_received(self, event):
        for event in self.http.handle_event(event):
            headers, body, done = self.answers[event.stream_id]
            if isinstance(event, HeadersReceived):
                headers.update({name.decode(): value.decode() for name, value in event.headers})
            elif isinstance(event, DataReceived):
                body.extend(event.data)
            if event.stream_ended and not done.done():
                done.set_result((headers, bytes(body)))

    async def ask(self, method, path, body=b""):
        stream = self._quic.get_next_available_stream_id()
        self.answers[stream] = ({}, bytearray(), self._loop.create_future())
        head = [(b":method", method), (b":scheme", b"https"), (b":authority", b"shop.example"), (b":path", path)]
        self.http.send_headers(stream, head, end_stream=not body)
        for start in range(0, len(body), 65536):
            self.http.send_data(stream, body[start:start + 65536], end_stream=start + 65536 >= len(body))
        self.transmit()
        return await asyncio.wait_for(self.answers[stream][2], 60)

async def main():
    configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, server_name="shop.example")
    configuration.load_verify_locations(ca)
    async with connect("127.0.0.1", port, configuration=configuration, create_protocol=Client) as client:
        headers, body = await client.ask(b"GET", b"/aioquic")
        print("get", headers[":status"], headers.get("x-backend"))
        many = await asyncio.gather(*(client.ask(b"GET", b"/many") for _ in range(50)))
        print("many", sum(headers[":status"] == "200" for headers, _ in many))
        sent = bytes(range(256)) * 4096
        headers, body = await client.ask(b"POST", b"/echo", sent)
        print("echo", headers[":status"], body == sent)

asyncio.run(main())
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aioquic_speaks_http3_with_it() -> anyhow::Result<()> {
    let mut probe = Command::new("python3");
    probe.args(["-c", "import aioquic.h3.connection"]);
    if !is_there("LEEWARD_TEST_AIOQUIC", "python3 with aioquic", probe).await {
        return Ok(());
    }
    let rig = rig().await?;
    rig.backend.behave(leeward_testkit::Behave::ByPath {
        paths: vec![("/echo".to_owned(), leeward_testkit::Behave::Echo)],
        other: Box::new(leeward_testkit::Behave::Answer(leeward_testkit::Answer::text(
            "ok",
        ))),
    });
    rig.put("ask.py", SCRIPT)?;
    let mut python = Command::new("python3");
    python
        .arg(rig.certificates.join("ask.py"))
        .arg(rig.address().port().to_string())
        .arg(rig.certificates.join("ca.crt"));
    let output = run(&mut python).await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    for want in ["get 200 shop", "many 50", "echo 200 True"] {
        assert!(text.contains(want), "{want}: {text}");
    }
    Ok(())
}
