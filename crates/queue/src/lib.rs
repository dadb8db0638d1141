//! q
mod entry;
pub use entry::*;
/// q
#[derive(Debug, Default)]
pub struct Queues;
impl Queues {
    /// a
    pub async fn accept(&self, _queue: &str, _r: StoredRequest) -> Result<Accepted, Refused> {
        Err(Refused::NoSuchQueue)
    }
    /// a
    pub async fn status(&self, _id: &EntryId) -> Option<EntryStatus> {
        None
    }
    /// a
    pub async fn discard(&self, _q: &str, _w: Which) -> Result<u64, QueueError> {
        Ok(0)
    }
}
