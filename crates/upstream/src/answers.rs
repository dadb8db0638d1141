//! How large answers are that come from other proxies: counted as they pass, known for each rule to all workers.

use crate::incoming::IncomingBody;
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use leeward_resilience::AnswerSize;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

/// How large the answers are that a rule's requests get, or those of a service that come by no rule.
#[derive(Debug, Default)]
pub struct Answers(AtomicU64);

/// An answer's body that is counted as it passes.
#[derive(Debug)]
pub struct Counted {
    body: IncomingBody,
    bytes: u64,
    of: Arc<Answers>,
}

impl Answers {
    /// What was seen of them.
    pub fn size(&self) -> AnswerSize {
        // Relaxed: the value stands for itself.
        AnswerSize::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Counts an answer's body as it passes. One that says nothing of how large this rule's answers are stays as it is: a
    /// failure, a redirect, or what never has a body. One to HEAD is the caller's to leave out.
    pub fn count(self: Arc<Self>, answer: Response<IncomingBody>) -> Response<IncomingBody> {
        let status = answer.status();
        if !status.is_success() || matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT) {
            return answer;
        }
        answer.map(|body| {
            IncomingBody::Counted(Box::new(Counted {
                body,
                bytes: 0,
                of: self,
            }))
        })
    }

    fn took(&self, bytes: u64) {
        // Of two at once one may be lost, which the next ones make good.
        self.0
            .store(self.size().observe(bytes).to_bits(), Ordering::Relaxed);
    }
}

impl Body for Counted {
    type Data = Bytes;
    type Error = <IncomingBody as Body>::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            this.bytes = this.bytes.saturating_add(data.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        // One that nobody read, as that of a hedge that lost, tells nothing. Of one that was read in part that part was
        // carried, and is what it has cost.
        if self.bytes > 0 || self.body.is_end_stream() {
            self.of.took(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    /// An answer as it comes from a peer, with a body of so many bytes; and the connection's other half, to be driven.
    async fn answer(head: &str, bytes: usize) -> Response<IncomingBody> {
        use hyper::client::conn::http1;
        use hyper_util::rt::TokioIo;
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let (mut sender, connection) = http1::handshake(TokioIo::new(near)).await.unwrap();
        tokio::task::spawn_local(connection);
        let head = head.to_owned();
        tokio::task::spawn_local(async move {
            let mut asked = [0; 1024];
            let _ = far.read(&mut asked).await.unwrap();
            far.write_all(head.as_bytes()).await.unwrap();
            // A reader that stops early ends the connection.
            let _ = far.write_all(&vec![0; bytes]).await;
        });
        let request = http::Request::new(http_body_util::Empty::<Bytes>::new());
        sender
            .send_request(request)
            .await
            .unwrap()
            .map(IncomingBody::Http)
    }

    async fn local<T>(work: impl Future<Output = T>) -> T {
        tokio::task::LocalSet::new().run_until(work).await
    }

    fn ok(length: usize) -> String {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n")
    }

    #[tokio::test]
    async fn what_passes_is_counted() {
        local(async {
            let answers = Arc::<Answers>::default();
            for _ in 0..40 {
                let counted = Arc::clone(&answers).count(answer(&ok(300_000), 300_000).await);
                assert_eq!(counted.body().size_hint().exact(), Some(300_000));
                let body = counted.into_body().collect().await.unwrap().to_bytes();
                assert_eq!(body.len(), 300_000);
            }
            assert!(answers.size().is_large(), "{answers:?}");
            assert!(
                (200_000..=300_000).contains(&answers.size().mean()),
                "{answers:?}"
            );
        })
        .await;
    }

    #[tokio::test]
    async fn a_part_counts_as_what_it_was() {
        local(async {
            let answers = Arc::<Answers>::default();
            let mut counted = Arc::clone(&answers).count(answer(&ok(1 << 20), 1 << 20).await);
            let first = counted.body_mut().frame().await.unwrap().unwrap();
            let first = first.into_data().unwrap().len() as u64;
            drop(counted);
            assert_eq!(answers.size(), AnswerSize::default().observe(first));
        })
        .await;
    }

    #[tokio::test]
    async fn what_says_nothing_of_their_size_is_left_out() {
        local(async {
            let answers = Arc::<Answers>::default();
            // As if answers had been large.
            for _ in 0..100 {
                answers.took(1 << 20);
            }
            let before = answers.size();
            for head in [
                "HTTP/1.1 204 No Content\r\n\r\n",
                "HTTP/1.1 304 Not Modified\r\ncontent-length: 1000000\r\n\r\n",
                "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
                "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
                "HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n",
            ] {
                let counted = Arc::clone(&answers).count(answer(head, 0).await);
                counted.into_body().collect().await.unwrap();
                assert_eq!(answers.size(), before, "{head}");
            }
            // Nobody has read it: another answer came first.
            drop(Arc::clone(&answers).count(answer(&ok(5), 5).await));
            assert_eq!(answers.size(), before);
            // One that is empty is small.
            drop(Arc::clone(&answers).count(answer(&ok(0), 0).await));
            assert!(answers.size().mean() < before.mean());
        })
        .await;
    }
}
