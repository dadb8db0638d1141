#![allow(dead_code)]
mod compare;
mod machine;
pub(crate) mod reach;
