//! Takes queued requests to the workers, which send them as everybody's are sent.

use crate::errand::{Errand, Returned, carry_out};
use crate::headers::IDEMPOTENCY_KEY;
use crate::route::Choice;
use crate::worker::Worker;
use http::{HeaderName, HeaderValue, Method, Request, Uri, header, request};
use leeward_queue::{Deliver, Delivered, Delivery, StoredRequest};
use leeward_telemetry::Peer;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// Hands deliveries to the workers, in turn.
#[derive(Debug, Default)]
pub struct Courier {
    // Poison is harmless: the list is only added to and rotated.
    workers: Mutex<Vec<mpsc::Sender<Job>>>,
}

/// One delivery for a worker.
#[derive(Debug)]
pub(crate) struct Job {
    delivery: Delivery,
    done: oneshot::Sender<Delivered>,
}

/// Deliveries that may wait for one worker; more wait with the queue.
const INBOX: usize = 64;

impl Courier {
    /// What comes for a worker that has just begun.
    pub(crate) fn enlist(&self) -> mpsc::Receiver<Job> {
        let (sender, receiver) = mpsc::channel(INBOX);
        self.workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(sender);
        receiver
    }

    /// The next worker that is still there.
    fn next(&self) -> Option<mpsc::Sender<Job>> {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.retain(|worker| !worker.is_closed());
        if workers.is_empty() {
            return None;
        }
        workers.rotate_left(1);
        workers.first().cloned()
    }

    async fn take(&self, delivery: Delivery) -> Delivered {
        let not_sent = || Delivered::NotSent {
            why: "the proxy has no worker".into(),
            retry_after: None,
        };
        let Some(worker) = self.next() else {
            return not_sent();
        };
        let (done, told) = oneshot::channel();
        if worker.send(Job { delivery, done }).await.is_err() {
            return not_sent();
        }
        // A worker that ends in the middle leaves it open whether the service has got it.
        told.await.unwrap_or_else(|_| Delivered::Failed {
            why: "the proxy's worker ended".into(),
            status: None,
            retry_after: None,
        })
    }
}

impl Deliver for Courier {
    fn deliver(&self, delivery: Delivery) -> Pin<Box<dyn Future<Output = Delivered> + Send + '_>> {
        Box::pin(self.take(delivery))
    }
}

/// Carries out what comes, until dropped.
pub(crate) async fn run(worker: &Rc<Worker>, mut jobs: mpsc::Receiver<Job>) {
    while let Some(Job { delivery, mut done }) = jobs.recv().await {
        let worker = Rc::clone(worker);
        // Its owner is the worker, which counts it and ends with its runtime.
        tokio::task::spawn_local(async move {
            let delivered = tokio::select! {
                biased;
                // Given up, which is to cut it off: another proxy may deliver by now.
                () = done.closed() => return,
                delivered = deliver(worker, delivery.request) => delivered,
            };
            // Whoever asked may have gone, and then asks again.
            let _ = done.send(delivered);
        });
    }
}

async fn deliver(worker: Rc<Worker>, stored: StoredRequest) -> Delivered {
    match errand(stored) {
        Ok(errand) => verdict(carry_out(worker, errand).await),
        // What was stored was a request once; a file that was tampered with may hold anything.
        Err(error) => {
            tracing::error!(%error, "what a queue has stored is no request");
            Delivered::Answered { status: 400 }
        }
    }
}

fn errand(stored: StoredRequest) -> Result<Errand, http::Error> {
    let mut builder = Request::builder()
        .method(Method::from_bytes(stored.method.as_bytes())?)
        .uri(stored.target.parse::<Uri>()?);
    for (name, value) in stored.headers {
        builder = builder.header(
            HeaderName::from_bytes(name.as_bytes())?,
            HeaderValue::from_bytes(&value)?,
        );
    }
    let (mut parts, ()): (request::Parts, ()) = builder.body(())?.into_parts();
    parts
        .headers
        .insert(header::HOST, HeaderValue::from_str(&stored.authority)?);
    parts
        .headers
        .insert(IDEMPOTENCY_KEY, HeaderValue::from_str(&stored.idempotency_key)?);
    Ok(Errand {
        parts,
        body: stored.body.to_vec(),
        peer: Peer {
            address: stored.client,
            identity: stored.identity,
        },
        from_outside: stored.from_outside,
        fill: None,
        choice: Some(Choice {
            rule: stored.route,
            service: stored.service,
            subset: None,
        }),
    })
}

/// What the queue is to make of it.
fn verdict(returned: Returned) -> Delivered {
    match returned {
        Returned::Answered { status, retry_after } => match status.as_u16() {
            code @ (408 | 425 | 429 | 500..) => Delivered::Failed {
                why: format!("answered {code}").into(),
                status: Some(code),
                retry_after,
            },
            code => Delivered::Answered { status: code },
        },
        Returned::Failed {
            why,
            not_sent: false,
            retry_after,
        } => Delivered::Failed {
            why: why.into(),
            status: None,
            retry_after,
        },
        Returned::Failed {
            why,
            not_sent: true,
            retry_after,
        } => Delivered::NotSent {
            why: why.into(),
            retry_after,
        },
    }
}
