//! Tokens and certificates in the store. What has begun is finished even if the caller goes away.

use super::{Policy, Refused, detached};
use crate::store::{IssuedRow, NewToken, TokenUse};
use leeward_policy::model::Workload;
use leeward_policy::{Key, Kind, Name, Spec};

impl Policy {
    /// Keeps a token.
    pub(crate) async fn put_token(&self, token: NewToken, now_ms: i64) -> Result<(), Refused> {
        let store = self.store.clone();
        detached(async move { Ok(store.put_token(&token, now_ms).await?) }).await
    }

    /// Uses a token up for one key pair, if it is good.
    pub(crate) async fn use_token(
        &self,
        hash: [u8; 32],
        id: String,
        used_by: String,
        now_ms: i64,
    ) -> Result<TokenUse, Refused> {
        let store = self.store.clone();
        detached(async move { Ok(store.use_token(&hash, &id, &used_by, now_ms).await?) }).await
    }

    /// Remembers a certificate that is about to be given.
    pub(crate) async fn put_certificate(&self, row: IssuedRow, now_ms: i64) -> Result<(), Refused> {
        let store = self.store.clone();
        detached(async move { Ok(store.put_certificate(&row, now_ms).await?) }).await
    }

    /// A Workload, as policy has it now; one that this build can't read is none.
    pub(crate) async fn workload(&self, name: Name) -> Result<Option<Workload>, Refused> {
        self.store.settle().await?;
        let kind = Kind::Workload;
        let world = self.world().await?;
        let entry = world.known.get(&Key { kind, name });
        let resource = entry.and_then(|entry| entry.resource.as_deref());
        Ok(match resource.map(|resource| &resource.spec) {
            Some(Spec::Workload(workload)) => Some(workload.clone()),
            _ => None,
        })
    }

    /// The certificates that are still good.
    pub(crate) async fn certificates(&self, now_ms: i64) -> Result<Vec<IssuedRow>, Refused> {
        Ok(self.store.certificates(now_ms).await?)
    }
}
