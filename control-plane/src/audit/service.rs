//! The audit log over gRPC.

use super::Audit;
use super::list::{Cursor, Wanted, page};
use crate::access::caller;
use crate::refusal::{bad, status};
use leeward_proto::v1::audit_service_server::AuditService;
use leeward_proto::{parse_key, v1};
use tonic::{Request, Response, Status};

/// Entries on a page, where the request doesn't say, and at most.
const PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;

/// Serves the audit log.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    audit: Audit,
}

impl Service {
    pub(crate) const fn new(audit: Audit) -> Self {
        Self { audit }
    }
}

#[tonic::async_trait]
impl AuditService for Service {
    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<v1::ListAuditResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let size = match request.page_size {
            0 => PAGE,
            size if size <= MAX_PAGE => size,
            size => {
                return Err(bad(
                    "page_size",
                    format!("{size} is out of range; want at most {MAX_PAGE}"),
                ));
            }
        };
        let resource = request.resource.as_ref().map(parse_key).transpose();
        let resource = resource.map_err(|field| bad(&format!("resource.{}", field.path), field.reason))?;
        let cursor = Cursor::parse(&request.page_token).ok_or_else(|| {
            let shown: String = request.page_token.chars().take(80).collect();
            bad("page_token", format!("{shown:?} is not one of ours"))
        })?;
        let since_ms = request
            .since
            .map(|since| since.seconds.saturating_mul(1000) + i64::from(since.nanos / 1_000_000));
        let grants = caller.grants();
        let wanted = Wanted {
            who: &request.who,
            resource: resource.as_ref(),
            since_ms,
            size: usize::try_from(size).unwrap_or(usize::MAX),
            sees: &|kind, labels| grants.sees(kind, labels),
            sees_all: grants.sees_all(),
            asks: caller.who(),
        };
        let store = &self.audit.shared.store;
        store.settle().await.map_err(|error| status(error.into()))?;
        let (entries, next) = page(store, cursor, &wanted)
            .await
            .map_err(|error| status(error.into()))?;
        Ok(Response::new(v1::ListAuditResponse {
            entries,
            next_page_token: next.map(|cursor| cursor.text()).unwrap_or_default(),
        }))
    }
}
