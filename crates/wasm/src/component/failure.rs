//! The request that failed, as the world `fallback` sees it, in both versions of the contract.

use super::bindings::fallback::leeward::plugin::{failure, types};
use super::bindings::first::leeward::plugin::types as first;
use super::convert;
use super::state::{State, Subject, micros};
use crate::call::{Action, CallAttempt, FailedCall};
use crate::clock::now;
use leeward_policy::model::Cause;
use wasmtime::Error;
use wasmtime::component::Resource;

/// What a guest has a handle of: the one that the call is about, whatever the handle's number.
#[derive(Debug)]
#[allow(unreachable_pub, reason = "the generated bindings re-export it")]
pub enum FailedRequest {}

impl State {
    fn failure(&self) -> Result<&FailedCall, Error> {
        match &self.subject {
            Subject::Failure(call) => Ok(call),
            // Handles don't outlive a call.
            Subject::None | Subject::Passing(_) => Err(Error::msg("there is no failed request")),
        }
    }
}

/// What both versions of the contract say in the same words.
macro_rules! in_both_versions {
    ($types:ident) => {
        fn method(&mut self, _: Resource<FailedRequest>) -> Result<String, Error> {
            Ok(self.failure()?.head.method.as_str().to_owned())
        }

        fn path(&mut self, _: Resource<FailedRequest>) -> Result<String, Error> {
            Ok(self.failure()?.head.path.path().to_owned())
        }

        fn query(&mut self, _: Resource<FailedRequest>) -> Result<Option<String>, Error> {
            Ok(self.failure()?.head.path.query().map(str::to_owned))
        }

        fn authority(&mut self, _: Resource<FailedRequest>) -> Result<String, Error> {
            Ok(self.failure()?.head.authority.to_string())
        }

        fn header(&mut self, _: Resource<FailedRequest>, name: String) -> Result<Vec<Vec<u8>>, Error> {
            Ok(convert::values(&self.failure()?.head.headers, &name))
        }

        fn headers(&mut self, _: Resource<FailedRequest>) -> Result<Vec<$types::Header>, Error> {
            let headers = self.failure()?.head.headers.iter();
            let header = |(name, value): (&http::HeaderName, &http::HeaderValue)| $types::Header {
                name: name.as_str().to_owned(),
                value: value.as_bytes().to_vec(),
            };
            Ok(headers.map(header).collect())
        }

        fn body(&mut self, _: Resource<FailedRequest>) -> Result<Option<Vec<u8>>, Error> {
            Ok(self.failure()?.body.as_ref().map(|body| body.to_vec()))
        }

        fn attempts(&mut self, _: Resource<FailedRequest>) -> Result<Vec<$types::Attempt>, Error> {
            let attempt = |a: &CallAttempt| $types::Attempt {
                endpoint: a.endpoint.to_string(),
                zone: a.zone.to_string(),
                status: a.status,
                cause: a.cause.map(Into::into),
                duration_us: micros(a.duration),
            };
            Ok(self.failure()?.attempts.iter().map(attempt).collect())
        }

        fn cause(&mut self, _: Resource<FailedRequest>) -> Result<$types::Cause, Error> {
            Ok(self.failure()?.cause.into())
        }

        fn service(&mut self, _: Resource<FailedRequest>) -> Result<String, Error> {
            Ok(self.failure()?.facts.service.to_string())
        }

        fn route(&mut self, _: Resource<FailedRequest>) -> Result<String, Error> {
            Ok(self.failure()?.facts.route.to_string())
        }

        fn zone(&mut self, _: Resource<FailedRequest>) -> Result<String, Error> {
            Ok(self.failure()?.facts.zone.to_string())
        }

        fn config(&mut self, _: Resource<FailedRequest>) -> Result<String, Error> {
            Ok(self.failure()?.facts.config.to_string())
        }

        fn drop(&mut self, _: Resource<FailedRequest>) -> Result<(), Error> {
            Ok(())
        }
    };
}

impl failure::Host for State {}

impl failure::HostFailedRequest for State {
    in_both_versions!(types);

    fn peer(&mut self, _: Resource<FailedRequest>) -> Result<Option<String>, Error> {
        Ok(self.failure()?.facts.peer.as_ref().map(ToString::to_string))
    }

    fn kept(&mut self, _: Resource<FailedRequest>) -> Result<Option<types::KeptResponse>, Error> {
        let kept = self.failure()?.kept.as_ref();
        let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Ok(kept.map(|kept| types::KeptResponse {
            response: convert::response(&kept.reply),
            age_ms: millis(kept.age),
            fresh_ms: millis(kept.fresh),
        }))
    }
}

impl first::Host for State {}

impl first::HostFailedRequest for State {
    in_both_versions!(first);

    fn time_left_us(&mut self, _: Resource<FailedRequest>) -> Result<u64, Error> {
        let deadline = self.failure()?.facts.deadline;
        Ok(deadline.map_or(u64::MAX, |at| micros(at.saturating_duration_since(now()))))
    }
}

impl From<Cause> for types::Cause {
    fn from(cause: Cause) -> Self {
        match cause {
            Cause::ConnectFailure => Self::ConnectFailure,
            Cause::Timeout => Self::Timeout,
            Cause::Reset => Self::Reset,
            Cause::NoEndpoint => Self::NoEndpoint,
            Cause::Overflow => Self::Overflow,
            Cause::UpstreamStatus => Self::UpstreamStatus,
            Cause::CircuitOpen => Self::CircuitOpen,
            Cause::Overloaded => Self::Overloaded,
            Cause::RateLimited => Self::RateLimited,
            // The contract has no word for it. Policy has to ask for a plugin here, and what it may know is that somebody
            // decided against the call.
            Cause::Disabled
            | Cause::AuthorizationDenied
            | Cause::IdentityMissing
            | Cause::AuthorizationUnknown => Self::Disabled,
        }
    }
}

impl From<Cause> for first::Cause {
    fn from(cause: Cause) -> Self {
        match cause {
            Cause::ConnectFailure => Self::ConnectFailure,
            Cause::Timeout => Self::Timeout,
            Cause::Reset => Self::Reset,
            Cause::NoEndpoint => Self::NoEndpoint,
            Cause::UpstreamStatus => Self::UpstreamStatus,
            // Version 0.1 of the contract has one word for all that the proxy itself refuses; more words would be
            // another type, which components that were built against it don't fit.
            Cause::Overflow
            | Cause::CircuitOpen
            | Cause::Overloaded
            | Cause::RateLimited
            | Cause::Disabled
            | Cause::AuthorizationDenied
            | Cause::IdentityMissing
            | Cause::AuthorizationUnknown => Self::Overflow,
        }
    }
}

/// What a plugin wants done, with its answer checked.
///
/// # Errors
///
/// What is wrong with the answer.
pub(crate) fn action(action: failure::Action) -> Result<Action, String> {
    Ok(match action {
        failure::Action::Respond(response) => Action::Respond(convert::reply(response)?),
        failure::Action::Reroute(service) => Action::Reroute(service),
        failure::Action::Decline => Action::Decline,
        failure::Action::Stale => Action::Stale,
        failure::Action::Enqueue(receipt) => Action::Enqueue {
            queue: receipt.queue,
            reply: convert::reply(receipt.response)?,
        },
    })
}

impl From<first::Action> for failure::Action {
    fn from(action: first::Action) -> Self {
        match action {
            first::Action::Respond(response) => Self::Respond(response.into()),
            first::Action::Reroute(service) => Self::Reroute(service),
            first::Action::Decline => Self::Decline,
        }
    }
}
