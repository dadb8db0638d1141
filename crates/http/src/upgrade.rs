//! After a change of protocol: bytes both ways until one side ends.

use crate::exchange::Exchange;
use crate::worker::Connections;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

/// Carries bytes between a client and an upstream that have both changed protocols. The exchange ends with
/// the tunnel.
pub(crate) fn tunnel(mut exchange: Box<Exchange>, client: OnUpgrade, upstream: OnUpgrade) {
    let counted = Connections::hold(exchange.worker());
    // The HTTP/1.1 connection is the tunnel's now; it can't go back to the pool.
    exchange.keep = None;
    // Its owner is the worker, which counts it and ends with its runtime.
    tokio::task::spawn_local(async move {
        let _counted = counted;
        let (client, upstream) = match tokio::try_join!(client, upstream) {
            Ok(both) => both,
            Err(error) => {
                tracing::debug!(%error, "protocol change failed");
                exchange.cut_short_by_upstream();
                return;
            }
        };
        let (mut client, mut upstream) = (TokioIo::new(client), TokioIo::new(upstream));
        match tokio::io::copy_bidirectional(&mut client, &mut upstream).await {
            Ok((sent, received)) => {
                exchange.record.response_bytes = received;
                exchange.intake.add(sent);
                exchange.complete();
            }
            // One side went away without a word; the record says so when the exchange is dropped.
            Err(error) => tracing::debug!(%error, "tunnel ended"),
        }
    });
}
