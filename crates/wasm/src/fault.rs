//! Why a call of a plugin came to nothing.

/// Why a call gave no result. A fault is the plugin's, never the request's.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Fault {
    /// The guest trapped.
    Trap,
    /// It was still running when its time was up.
    Time,
    /// It asked for more memory, or a larger table, than it may have.
    Memory,
    /// Its answer is not one that may be given.
    BadResponse,
    /// It wants a body in one piece that is larger than it may have.
    BodyTooLarge,
    /// There is no such plugin here, or not yet.
    NotLoaded,
    /// It faulted too often of late, and is left alone.
    Quarantined,
    /// All its instances were busy until the time was up, the process has no room for another, or the request left it too
    /// little time.
    Busy,
}

impl Fault {
    /// Every fault, in order.
    pub const ALL: [Self; 8] = [
        Self::Trap,
        Self::Time,
        Self::Memory,
        Self::BadResponse,
        Self::BodyTooLarge,
        Self::NotLoaded,
        Self::Quarantined,
        Self::Busy,
    ];

    /// The word used in traces, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Time => "time",
            Self::Memory => "memory",
            Self::BadResponse => "bad_response",
            Self::BodyTooLarge => "body_too_large",
            Self::NotLoaded => "not_loaded",
            Self::Quarantined => "quarantined",
            Self::Busy => "busy",
        }
    }

    /// Whether it tells something about the plugin's code, and so counts toward quarantine.
    pub const fn is_of_code(self) -> bool {
        match self {
            Self::Trap | Self::Time | Self::Memory | Self::BadResponse => true,
            Self::BodyTooLarge | Self::NotLoaded | Self::Quarantined | Self::Busy => false,
        }
    }
}
