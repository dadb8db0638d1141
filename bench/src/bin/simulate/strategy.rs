//! The ways of meeting failure and overload that are compared.

use leeward_policy::model::{
    AdaptiveConcurrency, AdmissionControl, BalancePolicy, CircuitBreaker, Ewma, LoadShedding,
    OutlierDetection, Retry, RetryBudget, RetryOn,
};
use std::time::Duration;

/// What every proxy of a run does.
#[derive(Clone, Debug)]
pub(crate) struct Strategy {
    pub(crate) name: &'static str,
    pub(crate) balance: BalancePolicy,
    /// How slow a failure counts for balancing; zero for not at all.
    pub(crate) failure_penalty: Duration,
    pub(crate) outlier_detection: Option<OutlierDetection>,
    pub(crate) retry: Option<Retry>,
    /// Longest time for one attempt; `None` for the request's.
    pub(crate) attempt_timeout: Option<Duration>,
    pub(crate) retry_budget: Option<RetryBudget>,
    /// Whether a retry tells the next hops that it is one.
    pub(crate) mark_retries: bool,
    pub(crate) circuit_breaker: Option<CircuitBreaker>,
    pub(crate) adaptive_concurrency: Option<AdaptiveConcurrency>,
    pub(crate) load_shedding: Option<LoadShedding>,
    pub(crate) admission_control: Option<AdmissionControl>,
}

/// So that three attempts fit into a second.
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(300);

impl Strategy {
    /// One attempt, to the better of two endpoints by latency, and nothing else.
    pub(crate) const NONE: Self = Self {
        name: "no retries",
        balance: BalancePolicy::PeakEwma(Ewma::DEFAULT),
        failure_penalty: Duration::ZERO,
        outlier_detection: None,
        retry: None,
        attempt_timeout: None,
        retry_budget: None,
        mark_retries: false,
        circuit_breaker: None,
        adaptive_concurrency: None,
        load_shedding: None,
        admission_control: None,
    };

    /// Three attempts, one right after the other.
    pub(crate) fn plain_retries() -> Self {
        Self {
            name: "plain retries",
            retry: Some(Retry {
                base_interval: Duration::ZERO,
                max_interval: Duration::ZERO,
                ..retry()
            }),
            attempt_timeout: Some(ATTEMPT_TIMEOUT),
            ..Self::NONE
        }
    }

    fn backoff() -> Self {
        Self {
            name: "retries with backoff and jitter",
            retry: Some(retry()),
            ..Self::plain_retries()
        }
    }

    pub(crate) fn budget() -> Self {
        Self {
            name: "+ retry budget",
            retry_budget: Some(RetryBudget::DEFAULT),
            ..Self::backoff()
        }
    }

    fn admission() -> Self {
        Self {
            name: "+ budget, admission control",
            admission_control: Some(AdmissionControl {
                window: Duration::from_secs(10),
                ..AdmissionControl::DEFAULT
            }),
            ..Self::budget()
        }
    }

    fn breaker() -> Self {
        Self {
            name: "+ budget, circuit breaker",
            circuit_breaker: Some(CircuitBreaker::DEFAULT),
            ..Self::budget()
        }
    }

    /// All that the proxy has.
    pub(crate) fn everything() -> Self {
        Self {
            name: "everything",
            failure_penalty: Duration::from_secs(5),
            outlier_detection: Some(OutlierDetection::DEFAULT),
            mark_retries: true,
            adaptive_concurrency: Some(AdaptiveConcurrency::DEFAULT),
            load_shedding: Some(LoadShedding::DEFAULT),
            ..Self::breaker()
        }
    }

    /// What is compared under overload and after a fault, each with more than the one before.
    pub(crate) fn ladder() -> Vec<Self> {
        vec![
            Self::NONE,
            Self::plain_retries(),
            Self::backoff(),
            Self::budget(),
            Self::admission(),
            Self::breaker(),
            Self::everything(),
        ]
    }

    /// What is compared where one of ten servers is bad.
    pub(crate) fn balancers() -> Vec<Self> {
        let ours = Self {
            name: "peak EWMA",
            ..Self::NONE
        };
        vec![
            Self {
                name: "round robin",
                balance: BalancePolicy::RoundRobin,
                ..Self::NONE
            },
            Self {
                name: "round robin, ejection",
                balance: BalancePolicy::RoundRobin,
                outlier_detection: Some(OutlierDetection::DEFAULT),
                ..Self::NONE
            },
            Self {
                name: "least request",
                balance: BalancePolicy::LeastRequest,
                ..Self::NONE
            },
            ours.clone(),
            Self {
                name: "peak EWMA, failure penalty",
                failure_penalty: Duration::from_secs(5),
                ..ours.clone()
            },
            Self {
                name: "peak EWMA, penalty, ejection",
                failure_penalty: Duration::from_secs(5),
                outlier_detection: Some(OutlierDetection::DEFAULT),
                ..ours
            },
            Self::everything(),
        ]
    }

    /// What is compared along a chain of services.
    pub(crate) fn chain() -> Vec<Self> {
        vec![
            Self::NONE,
            Self::plain_retries(),
            Self {
                name: "retries with a budget",
                ..Self::budget()
            },
            Self {
                name: "retries that are marked",
                mark_retries: true,
                ..Self::backoff()
            },
            Self {
                name: "budget and marks",
                mark_retries: true,
                ..Self::budget()
            },
            Self {
                name: "budget and breaker",
                ..Self::breaker()
            },
            Self::everything(),
        ]
    }
}

/// Three attempts in all after whatever may be over by then, with the usual pauses.
fn retry() -> Retry {
    Retry {
        on: vec![RetryOn::FiveXx, RetryOn::Reset],
        ..Retry::standard()
    }
}
